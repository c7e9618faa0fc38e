"""Writes adapters and states, deletes those that are outdated, and saves elsewhere on a full disk."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from library.base.errors import UserError, about, error_in
from library.base.formatting import format_bytes
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.metadata import file_metadata, modelspec_metadata
from library.checkpoints.overwriting import find_place
from library.memory.devices import SAVE_DTYPES
from library.options.train import TrainOptions
from library.training.reporting.console_lines import announce
from library.training.reporting.event_stream import Events
from library.training.reporting.events import Saved, SavedFor
from library.training.reporting.progress import Part, Progress
from library.training.saving.hub import Uploads
from library.training.saving.names import Names, state_folder
from library.training.saving.own_files import count_bytes, delete, move_changed, remove
from library.training.saving.readers import readers_line
from library.training.saving.rescue import NotWrittenError, free_bytes, write_somewhere
from library.training.saving.schedule import Schedule
from library.training.saving.timed import NUM_KEPT, TimedStates
from networks.core.protocol import AdoptedNetwork

logger = logging.getLogger(__name__)


class NonFiniteWeights(UserError):
    """The adapter's weights are NaN or infinite and are not written."""


class SavedElsewhere(UserError, OSError):
    """The run is complete, but its file had to be written to another location."""


@dataclass(frozen=True)
class Written:
    """Where a file or a state was saved."""

    location: Path
    is_settled: bool  # False if a write error kept it from its place, so that a later save may repair that


@dataclass(frozen=True)
class Writer:
    """Writes adapters and states; used in the main process only."""

    options: TrainOptions
    is_main: bool
    names: Names
    schedule: Schedule
    network: AdoptedNetwork
    architecture: Mapping[str, str]
    metadata: Mapping[str, str]
    base_files: Future[dict[str, str]]  # hashes of the base model's files, computed in the background
    saved_weights: Callable[[], AbstractContextManager[None]]  # swaps in the averaged weights, if these are saved
    write_state: Callable[[Path, int, int, Collection[Part]], None]  # (folder, step, epoch, finished parts of the step)
    uploads: Uploads
    resolution: tuple[int, int] | None = None  # width, height: the largest of the datasets
    state_bytes: Callable[[], int] = lambda: 0  # estimated size of a state
    timed: TimedStates = field(default_factory=TimedStates)
    specs: Sequence[BaseModelSpec] = ()  # of the base models that a file may belong to
    rescued: dict[str, Path] = field(default_factory=dict)  # the newest files written to another location, by kind
    relocated: dict[Path, Path] = field(default_factory=dict)  # weights whose place another program had taken
    events: Events = field(default_factory=Events)
    mentioned: set[str] = field(default_factory=set)  # messages about programs that were logged, to log each once

    def save_after_step(self, progress: Progress, epoch: int) -> None:
        """Save after the step if scheduled and not done yet, and delete what that outdates."""
        step = progress.step
        if self.is_main and self.schedule.saves_step(step):
            outdated = self.schedule.outdated_step(step), self._states.outdated_step(step)
            self._save_and_outdate("step", self.names.of_step, step, outdated, progress, epoch)

    def save_after_epoch(self, progress: Progress, epoch: int) -> None:
        """Save after `epoch` if scheduled and not done yet, and delete what that outdates."""
        if self.is_main and self.schedule.saves_epoch(epoch):
            outdated = self.schedule.outdated_epoch(epoch), self._states.outdated_epoch(epoch)
            self._save_and_outdate("epoch", self.names.of_epoch, epoch, outdated, progress, epoch)

    def save_now(self, progress: Progress, epoch: int) -> None:
        """Save after the step like a scheduled step, unless it is one. Later steps outdate its files as those of a
        stop."""
        if self.is_main and "step" not in progress.done:
            progress.stops = sorted({*progress.stops, progress.step})
            self._save(self.names.of_step(progress.step), progress, epoch, "step")

    def save_timed_state(self, progress: Progress, epoch: int) -> None:
        """Save a state between scheduled ones, unless the step has one already, and delete what that outdates."""
        step, folder = progress.step, self.names.of_timed_state(progress.step)
        if not self.is_main or self.timed.saved_step == step:
            return
        try:
            is_settled = self._write_state(folder, "step", step, epoch, progress.done).is_settled
        except NotWrittenError as error:
            logger.error("%s; training continues", error)
            return
        for path in self.timed.outdate(folder, self.names.list_timed_states()) if is_settled else ():
            remove("state", path, self.names.state_kind, self.events)

    def save_best(self, step: int, epoch: int) -> None:
        """Replace the file of the best weights, if requested."""
        if self.is_main and self.options.validation.keep_best_checkpoint:
            try:
                self.write(self.names.of_best(), step, epoch)
            except NotWrittenError as error:
                logger.error("%s; training continues", error)

    def save_weights_of_end(self, step: int, epoch: int) -> None:
        """Write the final file before the other work scheduled after the last step; `save_end` replaces it."""
        if self.is_main:
            self.write(self.names.of_end(), step, epoch)

    def save_end(self, progress: Progress, epoch: int, is_complete: bool = True) -> None:
        """Save a run that has taken all steps, with its state if a later start needs to know that it is over.

        `is_complete` is False if previews of the last step are left to a later start. Raises SavedElsewhere or
        NotWrittenError if the file is not in its place.
        """
        if not self.is_main:
            return
        path, state_options = self.names.of_end(), self.options.state
        written = self._write(path, progress.step, epoch, is_last=True)
        if state_options.save_state or state_options.save_state_on_train_end or state_options.autoresume:
            # A later start with this state writes the file again unless it is in its place and nothing else is left.
            done = {*progress.done, "end"} if written.is_settled and is_complete else progress.done
            self._save_state(path, progress.step, epoch, done, is_last=True)
        if not written.is_settled:
            raise SavedElsewhere(
                f"training is complete, but {path} could not be written: the adapter is {written.location}"
            )
        for folder in self.names.list_timed_states() if self.timed.every_minutes is not None else ():
            remove("state", folder, self.names.state_kind, self.events)
        announce("model saved.")

    def save_interrupted(self, progress: Progress, epoch: int) -> None:
        """Save an interrupted run: its weights, and always its state."""
        if self.is_main:
            announce(
                f"training was interrupted after step {progress.step}; to continue, give the same command with "
                f"{self._save_unfinished(progress, epoch)}"
            )

    def save_failed(self, progress: Progress, epoch: int) -> str:
        """Save a run that an error ended, like an interrupted one. Return a sentence about it.

        If the optimizer had updated only part of the weights, they belong to no step and get no state.
        """
        if progress.is_updating:
            location = self.write(self.names.of_step(progress.step), progress.step, epoch, is_last=True)
            return (
                f"the error came during the weight update of step {progress.step + 1}; the weights are saved as they "
                f"are in {location}"
            )
        return (
            f"training ended after step {progress.step}; the adapter and the state of that step are saved: once the "
            f"cause is fixed, give the same command with {self._save_unfinished(progress, epoch)}"
        )

    def _save_unfinished(self, progress: Progress, epoch: int) -> str:
        """Write weights and state. Return the options that resume from them."""
        path = self.names.of_step(progress.step)
        self.write(path, progress.step, epoch, is_last=True)
        progress.stops = sorted({*progress.stops, progress.step})
        folder = self._save_state(path, progress.step, epoch, progress.done, is_last=True).location
        return f"--resume {folder}" + (" or --autoresume" if folder == state_folder(path) else "")

    def write(self, path: Path, step: int, epoch: int, is_last: bool = False) -> Path:
        """Write the adapter atomically to `path`, or to another location if that fails or another program has put a
        file there. Return the location.

        Raises NonFiniteWeights, keeping an earlier file, if the weights are damaged; NotWrittenError if no location can
        take the file.
        """
        return self._write(path, step, epoch, is_last).location

    def _write(self, path: Path, step: int, epoch: int, is_last: bool = False) -> Written:
        # Front ends read this line, "removing old checkpoint" and "model saved." from the output.
        announce(f"\nsaving checkpoint: {path}")
        saved_at = time.time()
        dtype = save_dtype(self.options.saving.save_precision)
        with self.saved_weights():
            if not weights_are_finite(self.network.module):
                raise NonFiniteWeights(
                    f"the adapter has weights that are NaN or infinite after step {step}, so {path} is not written; "
                    "files saved before stay"
                )
            metadata = self._metadata(step, epoch, saved_at)
            target = find_place(path, self.names.adapter_kind)
            move_changed(target)
            location = write_somewhere(
                target,
                f".{self.names.extension}",
                bytes_in_file(self.network.module, dtype),
                lambda location: self.network.save_weights(location, dtype, metadata),
            )
        self._keep_newest_rescue("weights", location, target)
        if target != path:
            self.relocated[path] = location
        self.events.emit(
            Saved("weights", self.names.find_purpose(path), step, epoch, str(location), count_bytes(location))
        )
        self._tell_readers(location)
        self.uploads.send(location, is_last)
        return Written(location, location == target)

    def check_space(self) -> None:
        """Check before training that the disk has room for what the run will write.

        Raises UserError if not even the final file fits; warns if not all files do.
        """
        if not self.is_main:
            return
        folder = self.names.folder
        folder.mkdir(parents=True, exist_ok=True)
        free = free_bytes(folder)
        if free is None:
            return
        state_options, dtype = self.options.state, save_dtype(self.options.saving.save_precision)
        one_file, one_state = bytes_in_file(self.network.module, dtype), self.state_bytes()
        num_files = self.schedule.most_files(self.options.run.max_train_steps)
        num_states = self._states.most_files(self.options.run.max_train_steps) if state_options.save_state else 0
        num_states += state_options.save_state or state_options.save_state_on_train_end or state_options.autoresume
        num_states += 0 if self.timed.every_minutes is None else NUM_KEPT + 1  # the oldest goes after the new one
        needed = one_file * (num_files + 1) + one_state * num_states
        space = f"--output_dir {folder}: {format_bytes(free)} are free on its disk"
        if free < one_file:
            raise error_in("--output_dir")(
                f"{space}, and the adapter takes {format_bytes(one_file)}", "make room or name another folder"
            )
        if free < needed:
            logger.warning(
                "%s, and the run may write %s (%d files of %s, %d states of %s): make room, or keep fewer with "
                "--save_last_n_steps or --save_last_n_epochs",
                space, format_bytes(needed), num_files + 1, format_bytes(one_file), num_states, format_bytes(one_state),
            )  # fmt: skip

    @property
    def _states(self) -> Schedule:
        return self.schedule.for_states(self.options.state)

    def _save(self, path: Path, progress: Progress, epoch: int, part: Part) -> bool:
        """Write the weights and, if requested, the state; nothing if the run resumes from that state.

        Return True if both are settled; otherwise no older file may be deleted.
        """
        if part in progress.done:
            return True
        try:
            is_settled = self._write(path, progress.step, epoch).is_settled
            done = {*progress.done, part} if is_settled else progress.done
            if self.options.state.save_state:
                is_settled &= self._save_state(path, progress.step, epoch, done).is_settled
        except NotWrittenError as error:
            logger.error("%s; training continues", error)
            return False
        progress.done.add(part)
        return is_settled

    def _save_state(
        self, weights: Path, step: int, epoch: int, done: Collection[Part], is_last: bool = False
    ) -> Written:
        """Write the state that belongs to a weights file. Raises NotWrittenError."""
        written = self._write_state(state_folder(weights), self.names.find_purpose(weights), step, epoch, done)
        if self.options.hub.save_state_to_huggingface:
            self.uploads.send(written.location, is_last)
        return written

    def _write_state(self, folder: Path, purpose: SavedFor, step: int, epoch: int, done: Collection[Part]) -> Written:
        """Write a state. Raises NotWrittenError."""
        announce(f"\nsaving state: {folder}")
        target = find_place(folder, self.names.state_kind)
        location = write_somewhere(
            target, "", self.state_bytes(), lambda location: self.write_state(location, step, epoch, done)
        )
        self.timed.note_saved(step)
        self._keep_newest_rescue("state", location, target)
        self.events.emit(Saved("state", purpose, step, epoch, str(location), count_bytes(location)))
        return Written(location, location == target)

    def _keep_newest_rescue(self, kind: str, location: Path, path: Path) -> None:
        """Delete the previous file in another location, so that a run does not fill the disk for temporary files."""
        older = self.rescued.pop(kind, None) if location != path else None
        if older is not None:
            delete(older)
        if location != path:
            self.rescued[kind] = location

    def _save_and_outdate(
        self, part: Part, name_of: Callable[[int], Path], number: int, outdated: tuple[int | None, int | None],
        progress: Progress, epoch: int,
    ) -> None:  # fmt: skip
        """Save the files of a step or epoch, and delete the `outdated` ones, after their pending uploads."""
        if not self._save(name_of(number), progress, epoch, part):
            return
        weights, state = outdated
        deletions = [] if weights is None else [self._removal(name_of(weights))]
        if state is not None and self.options.state.save_state:
            deletions.append(self._removal_of_state(name_of(state)))
        for deletion in (*deletions, *self._outdate_stops(progress, epoch)):
            self.uploads.afterwards(deletion)

    def _outdate_stops(self, progress: Progress, epoch: int) -> list[Callable[[], None]]:
        """Return the deletions of files of stops between scheduled saves; without other states, the last stop keeps
        its own."""
        step, stops = progress.step, progress.stops
        kept_stop = max(stops, default=0) if not self.options.state.save_state else None
        weight_stops = [stop for stop in stops if self.schedule.outdates_stop(stop, step, epoch)]
        state_stops = [stop for stop in stops if self._states.outdates_stop(stop, step, epoch) and stop != kept_stop]
        progress.stops = [stop for stop in stops if stop not in weight_stops or stop not in state_stops]
        removals = [self._removal(self.names.of_step(stop)) for stop in weight_stops]
        return removals + [self._removal_of_state(self.names.of_step(stop)) for stop in state_stops]

    def _removal(self, weights: Path) -> Callable[[], None]:
        return partial(remove, "checkpoint", weights, self.names.adapter_kind, self.events)

    def _removal_of_state(self, weights: Path) -> Callable[[], None]:
        return partial(remove, "state", state_folder(weights), self.names.state_kind, self.events)

    def _tell_readers(self, path: Path) -> None:
        """Log which programs read a file's keys; for later files of a run only if that has changed."""
        line = readers_line(self.specs, path)
        if line is not None and line not in self.mentioned:
            self.mentioned.add(line)
            logger.info("%s: %s", path.name, line)

    def _metadata(self, step: int, epoch: int, saved_at: float) -> dict[str, str]:
        try:
            base_files = self.base_files.result()
        except OSError as error:  # the drive is gone; the weights matter more than these hashes
            logger.warning("the base model cannot be hashed, %s has no hash of it: %s", self.names.of_end().name, error)
            base_files = {}
        training = {**self.metadata, **base_files}
        modelspec = modelspec_metadata(self.options, self.architecture, saved_at, self.resolution)
        is_full = not self.options.metadata.no_metadata
        return file_metadata(training, modelspec, step=step, epoch=epoch, saved_at=saved_at, is_full=is_full)


def bytes_in_file(module: nn.Module, dtype: torch.dtype | None) -> int:
    """Estimate the size of an adapter's file; its metadata take a few kilobytes."""
    # A cast on the meta device allocates nothing.
    return sum((p if dtype is None else p.to("meta", dtype)).nbytes for p in module.parameters())


def weights_are_finite(module: nn.Module) -> bool:
    """Return True if no weight is NaN or infinite. Reads one value from the device."""
    flags = [parameter.detach().isfinite().all() for parameter in module.parameters()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """Return the dtype of the file; None keeps that of the adapter."""
    if save_precision is None:
        return None
    if save_precision not in SAVE_DTYPES:
        raise about("--save_precision")(f"is {save_precision}; it must be one of {', '.join(SAVE_DTYPES)}")
    return SAVE_DTYPES[save_precision]
