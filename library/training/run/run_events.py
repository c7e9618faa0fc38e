"""The events of a run from start to end, for the events file and the report."""

import sys
from bdb import BdbQuit
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from library.base.error_lines import ErrorFields
from library.base.errors import UserError
from library.base.launcher import launched_rank
from library.base.progress import listening
from library.checkpoints.metadata import commit_hash
from library.environment.packages import version_of
from library.options.base import Options
from library.options.output.reports import ReportOptions
from library.options.train import TrainOptions
from library.training.config_file import SECRETS
from library.training.failures.failure import StoppedByError
from library.training.failures.interruption import Interrupted
from library.training.failures.nonfinite import NonFiniteError
from library.training.report_page.index import IndexWriter
from library.training.report_page.writer import ReportWriter, earlier_record
from library.training.reporting.console_lines import ImageCounts
from library.training.reporting.error_fields import HIDDEN, describe_error, hide, list_secrets
from library.training.reporting.event_stream import FLAG, Events, JsonLines, Sink, WarningEvents, open_event_file, plain
from library.training.reporting.events import CountedImages, Start, TrainingPlan
from library.training.run_parts import Run
from library.training.saving.checkpoints import NonFiniteWeights
from library.training.saving.names import Names
from library.training.saving.resume import AlreadyComplete

PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "bitsandbytes", "numpy", "pillow")


@contextmanager
def open_events(
    options: TrainOptions,
    names: Names | None,
    command: Sequence[str] | None,
    warnings: WarningEvents,
    sinks: Sequence[Sink] = (),
) -> Iterator[Events]:
    """Open the event stream of a run in the main process; the last event says how the block ended. `sinks` take the
    events besides those that the options name.

    `names` are those of its files, None in a run that writes nothing. A run that ends without an error and is not
    stopped is finished. If events go to standard output, everything else goes to standard error.
    """
    with ExitStack() as stack:
        is_written = names is not None and launched_rank() == 0
        events = Events(
            [*open_sinks(options, options.reports, options.state.may_resume, names, stack), *sinks]
            if names is not None and is_written
            else []
        )
        if not events.is_on:
            warnings.connect(events)  # from here on warnings are not buffered
            yield events
            return
        stack.callback(events.close)
        stack.enter_context(listening(events.tell_progress))
        events.emit(Start(hide_secrets(command, options), list_changed_options(options), versions()))
        warnings.connect(events)
        try:
            yield events
        except AlreadyComplete:
            events.end("already complete")
            raise
        except (Interrupted, BdbQuit):  # a signal, or the quit of a debugger
            events.end("stopped")
            raise
        except BaseException as error:
            events.cause = "non-finite" if isinstance(error, NonFiniteError | NonFiniteWeights) else None
            events.end("error", *describe_end(error, options))
            raise


def open_sinks(run: Options, options: ReportOptions, resumes: bool, names: Names, stack: ExitStack) -> list[Sink]:
    """Open the sinks of the events of a run with these options."""
    path = options.log_events
    sinks: list[Sink] = []
    if path == "-":
        sinks.append(JsonLines(sys.stdout, f"{FLAG} -", closes=False))
        stack.enter_context(redirect_stdout(sys.stderr))
    elif path:
        sinks.append(open_event_file(Path(path), resumes, list_changed_options(run)))
    if not options.no_report:
        report = names.of_report()
        sinks.append(ReportWriter(report, earlier_record(report) if resumes else None, options.report_live))
        sinks.append(IndexWriter(report))  # after the report, which it reads
    return sinks


def hide_secrets(command: Sequence[str] | None, options: Options) -> list[str] | None:
    """Return a command line with keys and tokens hidden."""
    if command is None:
        return None
    secrets, words = list_secrets(options.flat()), []
    for word in command:
        name, equals, value = word.partition("=")
        hidden = HIDDEN if word in secrets else f"{name}={HIDDEN}" if equals and value in secrets else word
        words.append(hidden)
    return words


def list_changed_options(options: Options) -> dict[str, Any]:
    """Return every option that is not at its default, without keys and tokens."""
    values, defaults = options.flat(), type(options).defaults()
    return {name: plain(v) for name, v in values.items() if v != defaults[name] and name not in SECRETS}


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that compute."""
    installed = {package: version_of(package) for package in PACKAGES}
    packages = {"python": python_version()} | {name: version for name, version in installed.items() if version}
    commit = commit_hash()
    return packages if commit is None else {"commit": commit, **packages}


def format_error(error: BaseException) -> str:
    """Format an error and its causes in a few lines."""
    cause = f" ({format_error(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
    return f"{error}{cause}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}{cause}"


def build_plan_event(run: Run, counts: ImageCounts, first_step: int, resumed_from: str | None) -> TrainingPlan:
    options, plan, context = run.options, run.plan, run.context
    device = context.device
    images: CountedImages = {"train": counts.train, "validation": counts.validation, "reg": counts.reg}
    return TrainingPlan(
        base_model=context.arch.name,
        network=options.network.network_module or "",
        num_trained=sum(p.numel() for p in context.network.trainable_parameters()),
        seed=context.seed,
        first_step=first_step,
        resumed_from=resumed_from,
        max_train_steps=plan.max_train_steps,
        num_epochs=plan.num_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        batch_sizes=run.data.batch_sizes,
        accumulation=plan.accumulation,
        pictures=images,
        num_processes=run.processes.count,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        peak_flops=run.times.peak,
        planned=run.events.planned,
    )


def describe_end(error: BaseException, options: Options) -> tuple[str, ErrorFields]:
    """Return the text and the fields of the error that ended a run."""
    values = options.flat()
    cause = error.__cause__ if isinstance(error, StoppedByError) and error.__cause__ is not None else error
    paths = [name for name, declared in type(options).declarations().items() if declared.path]
    return hide(format_error(error), values), describe_error(cause, values, paths)
