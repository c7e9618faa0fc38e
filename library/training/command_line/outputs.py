"""The files of a run: their names, the lock on them, and the event stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from library.environment.installed import NEEDED_BY_ALL, check_gpu_is_used, check_installed
from library.options.dataset import DatasetOptions
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.options.training.run import DiagnosticOptions
from library.training.reporting.event_stream import Events, Sink, WarningEvents
from library.training.run.run_events import open_events
from library.training.saving.names import Names
from library.training.saving.run_lock import run_lock


def writes(diagnostics: DiagnosticOptions, dataset: DatasetOptions) -> bool:
    """Return False for a dry run and a look at the dataset."""
    return not (diagnostics.dry_run or dataset.debug_dataset)


def name_files(saving: SavingOptions) -> Names | None:
    """Check that the machine can train, and name the files of the run; None without an output folder."""
    check_installed("adapters", NEEDED_BY_ALL)
    check_gpu_is_used(torch)
    return Names.build(saving) if saving.output_dir else None


@contextmanager
def holding_outputs(
    options: TrainOptions,
    names: Names | None,
    command: Sequence[str] | None,
    warnings: WarningEvents,
    sinks: Sequence[Sink] = (),
) -> Iterator[Events]:
    """Open the event stream, which `sinks` take too, and keep other runs from writing the same files inside the
    block."""
    is_written = writes(options.diagnostics, options.dataset)
    with (
        run_lock(options.saving) if is_written else nullcontext(),
        open_events(options, names if is_written else None, command, warnings, sinks) as events,
    ):
        yield events
