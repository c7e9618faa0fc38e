"""The audit of a dataset before training (`audit_only`), without a base model."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from library.checkpoints.overwriting import check_target
from library.data.decoding.images import read_pixels
from library.data.plan.audit_findings import Finding, inspect
from library.data.plan.data_plan import DataPlan, build_plan
from library.errors import UserError
from library.options.train import TrainOptions
from library.protocols import LatentSpec
from library.training.command_line.pairs import show_pairs
from library.training.report_page.page import report_kind
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, write_page
from library.training.reporting.event_stream import WarningEvents, plain
from library.training.reporting.events import Audit, End, Event, FoundImage, Start
from library.training.reporting.events import Finding as FindingEvent
from library.training.reporting.sample_images import encode_data_url
from library.training.run.run_events import list_changed_options, versions
from library.training.saving.checkpoints import Names

logger = logging.getLogger(__name__)

MOST_SHOWN = 60  # images per finding on the page


def audit_only(options: TrainOptions, latents: LatentSpec, warnings: WarningEvents) -> None:
    """Audit the data and log the result; with `output_dir`, also write it as a page with all warnings.

    Raises UserError for mistakes in the description.
    """
    began = time.time()
    plan = audit_images(options, latents)
    warning_events = warnings.kept()  # findings below have their own section
    has_alpha = plan.spec.has_alpha
    findings = inspect(plan.samples, plan.subsets, len(plan.split.trained), plan.storage, has_alpha=has_alpha)
    for finding in findings:
        logger.warning("%s", finding.line)
    if not findings:
        logger.info("no problems found in the images")
    if options.saving.output_dir:
        events = [
            Start(None, list_changed_options(options), versions()),
            *warning_events,
            Audit(**plan.facts(), pairs=show_pairs(plan)),
            *(FindingEvent(finding.text, show_images(finding, plan), len(finding.images)) for finding in findings),
            End("finished", None, time.time() - began, None, None, None),
        ]
        path = Names.build(options.saving).path_with_ending("-audit.html")
        check_target("--audit_only:", path, report_kind(options.saving.output_name))
        write_page(path, build_report(collect_events(events)))
        logger.info("full report with thumbnails: %s", path)


def audit_images(options: TrainOptions, latents: LatentSpec) -> DataPlan:
    """Read the described images without a base model, log the findings, and return the images.

    Caption lengths in tokens are not measured.
    """
    plan = build_plan(options, latents, options.run.seed or 0, None, None)
    plan.audit(logger)
    return plan


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
