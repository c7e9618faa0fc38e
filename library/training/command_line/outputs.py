"""The files of a run: their names, the lock on them, and the event stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from library.installed import NEEDED_BY_ALL, check_gpu_is_used, check_installed
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.training.command_line.run_lock import run_lock
from library.training.reporting.event_stream import Events, WarningEvents
from library.training.run.run_events import open_events
from library.training.saving.names import Names


def writes(options: TrainOptions) -> bool:
    """Return False for a dry run and a look at the dataset."""
    return not (options.diagnostics.dry_run or options.dataset.debug_dataset)


def name_files(saving: SavingOptions) -> Names | None:
    """Check that the machine can train, and name the files of the run; None without an output folder."""
    check_installed("adapters", NEEDED_BY_ALL)
    check_gpu_is_used(torch)
    return Names.build(saving) if saving.output_dir else None


@contextmanager
def holding_outputs(
    options: TrainOptions, names: Names | None, command: Sequence[str] | None, warnings: WarningEvents
) -> Iterator[Events]:
    """Open the event stream, and keep other runs from writing the same files inside the block."""
    is_written = writes(options)
    with (
        run_lock(options.saving) if is_written else nullcontext(),
        open_events(options, names if is_written else None, command, warnings) as events,
    ):
        yield events
