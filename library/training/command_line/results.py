"""The end of a training run: its progress is saved, and its results are logged."""

import logging
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from library.base.determinism import explain_nondeterminism
from library.options.base import Options
from library.options.no_effect import is_set
from library.options.train import TrainOptions
from library.training.evaluation.choosing import format_choice
from library.training.failures.failure import save_on_error
from library.training.failures.nonfinite import save_last_good
from library.training.loop.steps import PreparedRun
from library.training.reporting.console_lines import announce, list_finished
from library.training.saving.saved_files import files_of_run

logger = logging.getLogger(__name__)
# Options beside the parts of the base model that change what is drawn.
DRAWN_WITH = ("vae", "v_parameterization", "clip_skip", "mixed_precision")

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@contextmanager
def saving_progress(prepared: PreparedRun) -> Iterator[None]:
    """Save the run if an error or a non-finite number ends the block, which trains it."""
    run = prepared.run
    try:
        with (
            run.events.stage("training"),
            save_last_good(prepared.writer),
            save_on_error(prepared.writer, prepared.progress, run.plan),
            explain_nondeterminism(),
            # Entered last, so that other processes hear of a failure before this one saves.
            run.processes.reporting_failures(),
        ):
            yield
    finally:
        prepared.charts.close()


def log_results(prepared: PreparedRun, first_step: int, seconds: float) -> bool:
    """Log what was trained in `seconds` since `first_step`. Return True if the run is complete."""
    run, is_main = prepared.run, prepared.run.processes.is_main
    if is_main and (speed := run.times.summary()) is not None:
        logger.info("%s", speed)
        run.events.summary = speed
    if not prepared.is_over:
        return False
    # A sharded weight is gathered by all processes together.
    measures = is_main or run.context.models.sharded is not None
    change = measure_change(prepared) if measures else None
    if is_main:
        log_end(prepared, first_step, seconds, change)
    return True


def measure_change(prepared: PreparedRun) -> float | None:
    """Return the size of the adapter's change relative to the base model's weights; None if it cannot be measured."""
    with prepared.writer.saved_weights():
        try:
            return prepared.run.context.network.relative_change()
        except torch.OutOfMemoryError:
            # The run is saved, and a layer's weight in float32 is all that did not fit.
            logger.info("the size of the change is not measured: out of GPU memory; tools/check_lora_weights.py does")
            return None


def log_end(prepared: PreparedRun, first_step: int, seconds: float, change: float | None) -> None:
    """Log what a complete run has trained in `seconds` since `first_step`, its size, and the suggested file."""
    run, names, network = prepared.run, prepared.writer.names, prepared.run.options.network
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
    # tools/draw.py knows neither generic pipelines nor other modules.
    if run.context.arch.specs and str(network.network_module).startswith("networks."):
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
