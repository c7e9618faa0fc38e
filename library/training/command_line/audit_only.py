"""Looks at the noise levels or the images of a run without a base model, such as the audit of a dataset."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from library.base.atomic_files import write_whole
from library.base.errors import UserError
from library.checkpoints.overwriting import check_target
from library.data.debug_dataset import show_batches
from library.data.decoding.images import read_pixels
from library.data.description.dataset_file import warn_of_overridden_defaults
from library.data.plan.audit_findings import Finding, inspect
from library.data.plan.data_plan import DataPlan, build_plan
from library.diffusion.flow import FlowMatching
from library.options.base import Options
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.protocols import LatentSpec
from library.training.command_line.checks import check
from library.training.command_line.option_checks import check_values
from library.training.command_line.pairs import show_pairs
from library.training.command_line.show_timesteps import resolve_timestep_preview, show_timesteps
from library.training.report_page.page import report_kind
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report
from library.training.reporting.event_stream import WarningEvents, plain
from library.training.reporting.events import Audit, End, Event, FoundImage, Start
from library.training.reporting.events import Finding as FindingEvent
from library.training.reporting.sample_images import encode_data_url
from library.training.run.run_events import list_changed_options, versions
from library.training.saving.names import Names

logger = logging.getLogger(__name__)
OptionsT = TypeVar("OptionsT", bound=TrainOptions)

MOST_SHOWN = 60  # images per finding on the page


def check_and_look(
    options: OptionsT,
    latents: LatentSpec | None,
    objective: Callable[[OptionsT], FlowMatching] | None,
    command: Sequence[str] | None,
    warnings: WarningEvents,
) -> bool:
    """Check the options. Return True if they request a look that needs no base model, after showing it."""
    # Timesteps need neither a model nor images, so only the values are checked.
    if latents is not None and objective is not None and (preview := resolve_timestep_preview(options)) is not None:
        check_values(options)
        show_timesteps(preview, options.saving, options.run.seed or 0, objective(options), latents.downscale)
        return True
    check(options)
    typed = {word.partition("=")[0].removeprefix("--") for word in command or ()}
    warn_of_overridden_defaults(options.dataset, options, typed)
    audits, base = options.dataset.audit_only, options.model.pretrained_model_name_or_path
    if latents is None or not (audits or (options.dataset.debug_dataset and not base)):
        return False
    began = time.time()
    plan = build_plan(options, latents, options.run.seed or 0, None, None)
    plan.audit(logger)
    if audits:
        audit(plan, options, options.saving, warnings, began)
        return True
    logger.info("no base model is named, so captions are not counted in tokens: --pretrained_model_name_or_path does")
    show_batches(plan)
    return True


def audit(plan: DataPlan, options: Options, saving: SavingOptions, warnings: WarningEvents, began: float) -> None:
    """Log an audit of the images; with `output_dir`, also write it as a page with all warnings."""
    warning_events = warnings.kept()  # findings below have their own section
    has_alpha = plan.spec.has_alpha
    findings = inspect(plan.samples, plan.subsets, len(plan.split.trained), plan.storage, has_alpha=has_alpha)
    for finding in findings:
        logger.warning("%s", finding.line)
    if not findings:
        logger.info("no problems found in the images")
    if saving.output_dir:
        events = [
            Start(None, list_changed_options(options), versions()),
            *warning_events,
            Audit(**plan.audit_values(), pairs=show_pairs(plan)),
            *(FindingEvent(finding.text, show_images(finding, plan), len(finding.images)) for finding in findings),
            End("finished", None, time.time() - began, None, None, None),
        ]
        path = Names.build(saving).path_with_ending("-audit.html")
        check_target("--audit_only:", path, report_kind(saving.output_name))
        write_whole(path, build_report(collect_events(events)))
        logger.info("full report with thumbnails: %s", path)


def show_images(finding: Finding, plan: DataPlan) -> Sequence[FoundImage]:
    """Return a finding's first images, with thumbnails of those that can be decoded."""
    notes = dict(finding.images[:MOST_SHOWN])
    images = {sample.image.key: sample.image for sample in plan.samples if sample.image.key in notes}
    found_images = []
    for key, note in notes.items():
        try:
            content = plan.storage.content(images[key])
            thumbnail = encode_data_url(Image.fromarray(read_pixels(key, content)[0]))
        except (UserError, OSError):
            thumbnail = None
        found_images.append(FoundImage(str(Path(key)) if images[key].location is None else key, note, thumbnail))
    return found_images


def collect_events(events: Sequence[Event]) -> Record:
    record = Record()
    for event in events:
        record.add(plain(event.as_line(time.time())))
    return record
