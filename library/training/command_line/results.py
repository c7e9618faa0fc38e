"""The end of a training run: its progress is saved, its results are logged, and the adapters of a sweep are ranked."""

import logging
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from library.determinism import explain_nondeterminism
from library.launcher import launched_rank
from library.options.base import Options
from library.options.no_effect import is_set
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.processes import Processes
from library.training.evaluation.choosing import format_choice
from library.training.failures.failure import save_on_error
from library.training.failures.nonfinite import save_last_good
from library.training.loop.adapter_run import PreparedRun
from library.training.report_page.page import TITLES
from library.training.reporting.console_lines import announce, list_finished
from library.training.reporting.event_stream import EventsOfAll
from library.training.reporting.log_prefix import log_prefix
from library.training.saving.names import Names
from library.training.saving.saved_files import files_of_run
from library.training.sweep.combinations import expand_combinations
from library.training.sweep.ranking import add_runs, collect_standing, log_ranking, rank
from library.training.sweep_record import NOT_FINITE

logger = logging.getLogger(__name__)
# Options beside the parts of the base model that change what is drawn.
DRAWN_WITH = ("vae", "v_parameterization", "clip_skip", "mixed_precision")

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@contextmanager
def saving_progress(prepared: Sequence[PreparedRun], processes: Processes, events: EventsOfAll) -> Iterator[None]:
    """Save every adapter if an error or a non-finite number ends the block, which trains them."""
    try:
        with ExitStack() as stack:
            stack.enter_context(events.stage("training"))
            for adapter in prepared:
                stack.enter_context(save_last_good(adapter.writer))
                stack.enter_context(save_on_error(adapter.writer, adapter.progress, adapter.run.plan))
            stack.enter_context(explain_nondeterminism())
            # Entered last, so that other processes hear of a failure before this one saves.
            stack.enter_context(processes.reporting_failures())
            yield
    finally:
        prepared[0].charts.close()


def log_results(
    prepared: Sequence[PreparedRun],
    processes: Processes,
    events: EventsOfAll,
    first_step: int,
    seconds: float,
    saving: SavingOptions,
    page: Path | None,
) -> bool:
    """Log what was trained in `seconds` since `first_step`, and rank the adapters of a sweep on its `page`. Return True
    if all adapters are complete."""
    first = prepared[0].run
    if processes.is_main and (speed := first.times.summary()) is not None:
        logger.info("%s", speed)
        for adapter_events in events.each:
            adapter_events.summary = speed
    last_step = first.plan.max_train_steps
    over = [adapter for adapter in prepared if adapter.progress.step >= last_step or adapter.progress.ended]
    for adapter in over:
        # A sharded weight is gathered by all processes together.
        measures = processes.is_main or adapter.run.context.models.sharded is not None
        change = measure_change(adapter) if measures else None
        if processes.is_main:
            with log_prefix(adapter.run.label):
                log_end(adapter, first_step, seconds, change)
    is_complete = len(over) == len(prepared)
    if is_complete and processes.is_main and first.sweep is not None:
        title = TITLES["sweep"] + (saving.output_name or Path(saving.output_dir or "").name)
        log_ranking(rank(collect_standing(prepared, first.sweep)), title, page)
    return is_complete


def measure_change(prepared: PreparedRun) -> float | None:
    """Return the size of an adapter's change relative to the base model's weights; None if it cannot be measured."""
    with prepared.writer.saved_weights():
        try:
            return prepared.run.context.network.relative_change()
        except torch.OutOfMemoryError:
            # The run is saved, and a layer's weight in float32 is all that did not fit.
            logger.info("the size of the change is not measured: out of GPU memory; tools/check_lora_weights.py does")
            return None


def complete_sweep_page(page: Path | None, options: OptionsT, names: Mapping[str, Names | None]) -> None:
    """Add charts and previews to the page of a finished sweep, once all reports are written."""
    if page is not None and launched_rank() == 0 and page.exists():
        chosen = {combination.label: combination.chosen for combination in expand_combinations(options)}
        add_runs(page, chosen, {label: own.of_report() for label, own in names.items() if own is not None})


def log_end(prepared: PreparedRun, first_step: int, seconds: float, change: float | None) -> None:
    """Log what a complete run has trained in `seconds` since `first_step`, its size, and the suggested file."""
    run, names, network = prepared.run, prepared.writer.names, prepared.run.options.network
    if prepared.progress.ended == NOT_FINITE:  # already reported
        run.events.end("error", f"it ended alone: {NOT_FINITE}")
        return
    choice = prepared.validation.choose(files_of_run(names))
    rank = f" of rank {network.network_dim}" if network.network_dim else ""
    trained = f"{network.network_module}{rank} on {run.context.arch.name}"
    relocated = prepared.writer.relocated
    end, best_file = (relocated.get(path, path) for path in (names.of_end(), names.of_best()))
    best, run.events.file = prepared.validation.record.best, str(end)
    num_steps = prepared.progress.step - first_step
    for line in list_finished(trained, num_steps, seconds, end, change, best, best_file):
        logger.info("%s", line)
    if choice is not None:
        run.events.emit(choice)
        logger.info("%s", format_choice(choice))
    # The adapters of a sweep are ranked instead; tools/draw.py knows neither generic pipelines nor other modules.
    if not run.label and run.context.arch.specs and str(network.network_module).startswith("networks."):
        suggested = end if choice is None or choice.suggested is None else Path(choice.suggested)
        # Not in the log: rich would break a command that is to be copied.
        announce(f"to draw with it:\n  {format_draw_command(run.options, suggested)}")


def format_draw_command(options: Options, adapter: Path) -> str:
    """Return the command that draws images with an adapter, on the base model and the parts of the run."""
    values, defaults, declarations = options.flat(), type(options).defaults(), type(options).declarations()
    prompts = values["sample_prompts"]
    words = ["python3", "tools/draw.py", values["pretrained_model_name_or_path"], "--adapter", str(adapter)]
    words += ["--prompts", prompts] if prompts else ["--prompt", "a prompt as your captions are"]
    for name, declared in declarations.items():
        if (declared.path == "part" or name in DRAWN_WITH) and is_set(values[name], defaults[name]):
            words += [f"--{name}"] if values[name] is True else [f"--{name}", str(values[name])]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
