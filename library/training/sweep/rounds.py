"""The rounds of --sweep_stop_after: all runs train to a pause, and those that are significantly worse end there.

Round k ends at the first validation from step N * 2**(k - 1) on, so all rounds together read the models and the caches
only a few times.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import error_in
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.training.sweep.outcomes import end_file
from library.training.sweep.worker import Standing

FLAG = "--sweep_stop_after"


@dataclass
class Rounds:
    """The pauses of a sweep."""

    first_step: int
    number: int = 0  # of the round that is being trained

    @classmethod
    def build(cls, options: TrainOptions, unranked: Sequence[str]) -> "Rounds | None":
        """Return the rounds; None without --sweep_stop_after. Raises UserError if nothing could be compared."""
        step = options.sweep.sweep_stop_after
        if step is None:
            return None
        if unranked:
            raise error_in(FLAG)(
                f"{FLAG}: {', '.join(unranked)} changes the held-out images or what their losses mean, so that runs "
                "cannot be compared",
                f"leave out {FLAG}",
            )
        has_images = options.dataset.dataset_config or options.validation.validation_split
        if options.concepts is not None or not has_images:
            raise error_in(FLAG)(
                f"{FLAG} compares runs by their validation, and there is none", "set --validation_split"
            )
        return cls(step)

    def next_step(self) -> int:
        """Begin a round, and return the step from which on its next validation ends it."""
        self.number += 1
        return int(self.first_step * 2 ** (self.number - 1))

    def find_worse(self, standings: Sequence[Standing], num_runs: int) -> list[str]:
        """Return the labels of the runs that are significantly worse than the best one; none if not all were measured
        after the same step. Imports torch."""
        from library.training.sweep.ranking import clearly_worse, pair_losses

        if len({standing.measured_step for standing in standings}) > 1:
            return []
        return clearly_worse(pair_losses(standings), num_runs, self.number)


def paused_files(saving: SavingOptions, step: int) -> tuple[Path, Path]:
    """Return the weights and the state of a pause after `step`."""
    end = end_file(saving)
    weights = end.with_name(f"{end.stem}-step{step:08d}{end.suffix}")
    return weights, end.with_name(f"{end.stem}-step{step:08d}-state")


def list_pauses(saving: SavingOptions) -> list[int]:
    """List the steps of a run's states."""
    end = end_file(saving)
    return [
        int(digits)
        for path in (end.parent.iterdir() if end.parent.is_dir() else ())
        if (digits := path.name.removeprefix(f"{end.stem}-step").removesuffix("-state")).isdecimal()
        and path.name == f"{end.stem}-step{digits}-state"
    ]


def end_at_pause(saving: SavingOptions, keeps_state: bool, step: int) -> None:
    """Make the weights of a pause the run's adapter, and delete the files of the pause."""
    (weights, _), end = paused_files(saving, step), end_file(saving)
    if weights.exists():
        temporary = end.with_name(f".{end.name}.unfinished")
        shutil.copyfile(weights, temporary)
        os.replace(temporary, end)
    delete_pause(saving, keeps_state, step)


def delete_pause(saving: SavingOptions, keeps_state: bool, step: int) -> None:
    """Delete the files of a pause that the user has not asked for."""
    weights, state = paused_files(saving, step)
    every = saving.save_every_n_steps
    if not (every and step % every == 0):
        weights.unlink(missing_ok=True)
    if not keeps_state and state.is_dir():
        shutil.rmtree(state)


def delete_passed(saving: SavingOptions, keeps_state: bool, step: int) -> None:
    """Delete the pauses before `step`. A sweep that was killed may have left several."""
    for passed in list_pauses(saving):
        if passed < step:
            delete_pause(saving, keeps_state, passed)
