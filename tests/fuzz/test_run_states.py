"""A run's states as a state machine: however often it is killed, stopped, short of disk or started by fewer processes,
it goes on from its newest whole state, and ends as it would have without."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import with_hashes
from library.checkpoints.saving import save_safetensors
from library.processes.process_group import ALONE
from library.training.loop.loop import train
from library.training.loop.steps import PreparedRun
from library.training.reporting.progress import Progress
from library.training.run.writer import build_writer, go_on
from library.training.saving import timed
from library.training.saving.checkpoints import SavedElsewhere
from library.training.saving.names import Names
from library.training.saving.rescue import NotWrittenError
from library.training.saving.resume import (
    AlreadyComplete,
    batches_of_state,
    clear_up,
    find_state,
    resolve_starting_step,
)
from library.training.saving.state import NETWORK_FILE, TENSOR_FILE
from library.training.saving.state_names import MANIFEST_FILE, TIMED
from library.training.saving.timed import NUM_KEPT
from library.training.step.accumulation import StepPlan
from tests.fuzz.budget import Step, any_walk, walk
from tests.unit.training.test_loop import Line, batch_of, run_of

NUM_BATCHES, NUM_STEPS, PER_STEP = 19, 13, 4  # five steps in an epoch, the last of them with fewer batches
TIMED_STATES = [f"mine-step{step:08d}{TIMED}-state" for step in (7, 16)]  # before and after the run is lengthened
KILLED_AFTER = ("mine-step00000004-state", "mine-step00000004.safetensors", "mine-state", *TIMED_STATES)
OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """Ends a run as a power cut does."""


class LineWithFile(Line):
    """A network of one number with a file."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        tensors = {"weight": self.weight.detach()}
        save_safetensors(file, tensors, with_hashes(tensors, {**metadata, "ss_network_module": "networks.lora"}))


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """Kill at the `number`-th operation on files, from 0: no later one happens, not even those that clean up."""
    calls: list[str] = []

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(plain.__name__)
            if len(calls) > number:
                raise Killed
            return plain(*arguments, **keywords)

        return call

    with mock.patch.multiple(os, **{name: wrap(getattr(os, name)) for name in OPERATIONS}), suppress(Killed):
        yield


@contextmanager
def killed_after(name: str) -> Iterator[None]:
    """Kill when something has been renamed to `name`."""
    is_dead: list[bool] = []

    def wrap(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if is_dead:
                raise Killed
            result = plain(*arguments, **keywords)
            is_dead[:] = [True] * (str(arguments[-1]).endswith(f"/{name}") and plain.__name__ in ("replace", "rename"))
            return result

        return call

    with mock.patch.multiple(os, **{name: wrap(getattr(os, name)) for name in OPERATIONS}), suppress(Killed):
        yield


@contextmanager
def full_disk(first: int, count: int) -> Iterator[None]:
    """Let `count` flushes fail from the `first` on."""
    calls: list[int] = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if first < len(calls) <= first + count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(os, "fsync", fsync), suppress(SavedElsewhere, NotWrittenError):
        yield


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


class RunStates(RuleBasedStateMachine):
    """A run in `out`, and what its folder must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="states-"))
        self.options: dict[str, Any] = {
            "save_state": True, "save_every_n_steps": 2, "save_last_n_steps": 2, "save_every_n_minutes": 3.0,
            "save_every_n_epochs": 1,
        }  # fmt: skip
        self.num_processes, self.lengths = PER_STEP, [NUM_STEPS]
        self.saved: dict[str, int] = {}  # the step of every state that was written where it belongs
        self.stops: set[int] = set()
        self.minutes = 0
        self.is_full = self.is_damaged = self.has_begun = False

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            shutil.rmtree(self.root)

    # Settings

    @precondition(lambda self: len(self.lengths) == 1)
    @rule()
    def lengthen(self) -> None:
        """Finish the run, and ask it for more steps, which go on from its last state."""
        self.run()
        self.lengths.append(NUM_STEPS + 4)

    @precondition(lambda self: not self.has_begun)
    @rule(
        steps=st.sampled_from([None, 1, 2, 3]), keeps=st.sampled_from([None, 1, 4]),
        keeps_states=st.sampled_from([None, 1, 6]), epochs=st.sampled_from([None, 1]), saves_states=st.booleans(),
    )  # fmt: skip
    def use_schedule(
        self, steps: int | None, keeps: int | None, keeps_states: int | None, epochs: int | None, saves_states: bool
    ) -> None:
        self.options |= {
            "save_state": saves_states, "save_every_n_steps": steps, "save_last_n_steps": keeps,
            "save_last_n_steps_state": keeps_states, "save_every_n_epochs": epochs, "save_last_n_epochs": 1,
        }  # fmt: skip

    @rule(minutes=st.sampled_from([None, 1.0, 2.0, 4.0]))
    def use_clock(self, minutes: float | None) -> None:
        self.options["save_every_n_minutes"] = minutes

    @rule(count=st.sampled_from([1, 2, 4]))
    def use_processes(self, count: int) -> None:
        """Go on with other processes by the same command, in which each process accumulates one batch."""
        self.num_processes = count

    # What happens to a run

    @rule(number=st.integers(0, 300))
    def kill(self, number: int) -> None:
        self.run(trouble=killed_at(number))

    @rule(name=st.sampled_from(KILLED_AFTER))
    def kill_after(self, name: str) -> None:
        """Kill the run when a file or state has its name, and before anything else happens."""
        self.run(trouble=killed_after(name))
        if not self.is_damaged and (self.out / name / MANIFEST_FILE).is_file():
            self.saved[name] = self.lengths[-1] if name == "mine-state" else int(name.split("-")[1][4:])

    @rule(step=st.integers(1, NUM_STEPS + 4))
    def stop(self, step: int) -> None:
        self.run(stop=step)

    @rule(first=st.integers(0, 60), count=st.integers(1, 9))
    def fill_disk(self, first: int, count: int) -> None:
        self.is_full = True
        self.run(trouble=full_disk(first, count))

    @precondition(
        lambda self: len(self.lengths) == 1
    )  # earlier steps would be trained with the rates of the new length
    @rule(name=st.sampled_from([NETWORK_FILE, TENSOR_FILE, MANIFEST_FILE]))
    def damage(self, name: str) -> None:
        """Flip a bit in the newest state: the one before is taken."""
        states = [path for path in self.out.glob("*-state") if (path / MANIFEST_FILE).is_file()]
        if states:
            newest = max(states, key=lambda path: (self.saved.get(path.name, 0), path.name))
            flip(newest / name)
            others = {path.name for path in states} - {newest.name}
            self.saved = {name: step for name, step in self.saved.items() if name in others}
            self.is_damaged = True  # what is damaged is not repaired, and the run may have lost all states

    def finish(self) -> None:
        """Finish the run and compare it with one that nothing has happened to."""
        self.run()
        names = {path.name for path in self.out.iterdir()}
        assert not [name for name in names if name.startswith(".")]
        self.run(reads="nothing is left")
        assert {path.name for path in self.out.iterdir()} == names
        with self.undisturbed() as whole:
            assert values_of(self.out) == values_of(whole.out)
            expected = {path.name for path in whole.out.iterdir()}
            more = {f"mine-step{step:08d}{end}" for step in self.stops for end in (".safetensors", "-state")}
            rescued = {name for name in names if "-rescued" in name}
            # A full disk gives files other names.
            assert self.is_full or self.is_damaged or expected <= names <= expected | more | rescued, names ^ expected

    @contextmanager
    def undisturbed(self) -> "Iterator[RunStates]":
        """Yield the run that nothing has happened to, whose folder lasts as long as the block."""
        whole = RunStates()
        whole.options = self.options
        try:
            for length in self.lengths:
                whole.lengths = [length]
                whole.run()
            yield whole
        finally:
            shutil.rmtree(whole.root)

    # The run

    @property
    def out(self) -> Path:
        return self.root / "above" / "out"

    def run(
        self, stop: int | None = None, reads: str = "", trouble: AbstractContextManager[None] | None = None
    ) -> None:
        """Start the command, which ends after `stop` steps of the whole run if it is asked to."""
        with ExitStack() as stack:
            # No power is cut here, and each call would take milliseconds.
            stack.enter_context(mock.patch.object(os, "fsync", lambda handle: None))
            stack.enter_context(mock.patch.object(tempfile, "tempdir", str(self.root)))
            stack.enter_context(mock.patch.object(timed, "monotonic", lambda: 60.0 * self.minutes))
            if trouble is not None:
                stack.enter_context(trouble)
            self.has_begun = True
            self.start(stop, reads)

    def start(self, stop: int | None, reads: str) -> None:
        values = {**self.options, "output_dir": str(self.out), "output_name": "mine", "autoresume": True}
        values |= {"optimizer_type": "AdamW", "lr_scheduler": "cosine", "max_train_steps": self.lengths[-1]}
        run, expected = run_of(batches=(), **values), max(self.saved.values(), default=0)
        names = Names.build(run.options.saving)
        clear_up(names)
        state = find_state(run.options.state, run.options.hub, names, ALONE)
        assert (0 if state is None else state.step) >= expected, "no step is trained again that a whole state holds"
        if state is None:
            self.num_processes = PER_STEP
        batches = batches_of_state(run.options.run.gradient_accumulation_steps, state, self.num_processes)
        options = run.options.with_values(batches)
        # This process computes the batches of all: what they sum is the same, see `test_processes.py`.
        plan = StepPlan.build(options.run, NUM_BATCHES, self.num_processes)
        assert plan.accumulation == PER_STEP
        progress = Progress()
        try:
            progress.step = resolve_starting_step(options.state, names.of_end(), plan, state)
        except AlreadyComplete as complete:
            assert "nothing is left" in str(complete)
            return
        assert not reads
        run.context.network.module.__class__ = LineWithFile
        arch: Any = run.context.arch
        arch.metadata, arch.specs, arch.codec.spec = {}, (), SimpleNamespace(computed_as="")
        run = replace(run, options=options, plan=plan, batches=self.draws(), data=DATA)
        recorded: Any = replace(run, processes=SimpleNamespace(count=self.num_processes, is_main=True))
        writer = build_writer(recorded, names, progress, VALIDATION, state)
        writer = replace(writer, write_state=self.noting(writer.write_state, names))
        writer.check_space()
        if state is not None:
            go_on(recorded, progress, VALIDATION, state)
        resumed = state if state is not None and state.step == progress.step else None
        prepared = PreparedRun(run, progress, writer, CHARTS, PREVIEWS, VALIDATION, resumed)
        train(prepared, Signal(progress, stop))  # type: ignore[arg-type]
        if stop is not None and progress.step < plan.max_train_steps:
            self.stops.add(progress.step)

    def noting(self, write: Callable[..., None], names: Names) -> Callable[..., None]:
        def write_state(folder: Path, step: int, epoch: int, done: Any) -> None:
            timed = {name for name in self.saved if TIMED in name}
            num_whole = sum((self.out / name).is_dir() for name in timed)
            assert num_whole >= min(NUM_KEPT, len(timed)) or self.is_full
            write(folder, step, epoch, done)
            if folder.name == "mine-state":
                self.saved = {name: step for name, step in self.saved.items() if name not in timed}
            if "-rescued" not in folder.name:
                self.saved[folder.name] = step

        return write_state

    def draws(self) -> Any:
        """Return batches whose values depend on their epoch, and let a minute go by with each step."""

        def iterate_epoch(epoch: int, indices: Sequence[int], *_: object) -> Iterator[Any]:
            for index in indices:
                self.minutes += index % PER_STEP == 0
                yield batch_of(1.0 + (7 * epoch + 3 * index) % 5)

        return SimpleNamespace(iterate_epoch=iterate_epoch, close=lambda: None, report_skipped=lambda logger: None)


class Signal:
    """Asks a run to stop after a step."""

    def __init__(self, progress: Progress, stop: int | None) -> None:
        self.progress, self.stop = progress, stop

    @property
    def is_requested(self) -> bool:
        return self.stop is not None and self.progress.step + 1 >= self.stop


def values_of(out: Path) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the values of the final file and of the final state."""
    state = out / "mine-state"
    files = [out / "mine.safetensors", state / NETWORK_FILE, state / TENSOR_FILE]
    tensors: dict[str, Tensor] = {f"{path.name}:{k}": v for path in files for k, v in load_state_dict(path).items()}
    content = json.loads((state / MANIFEST_FILE).read_text())
    table = content["parts"]["progress"]["table"]
    table[:] = [entry for entry in table if entry[0] != "stops"]
    kept = {name: content[name] for name in ("current_step", "current_epoch", "done", "parts")}
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}, kept


IDENTITY = {"num_pictures": 6, "num_batches": NUM_BATCHES, "pictures": "a", "captions": "b", "settings": "c"}
DATA: Any = SimpleNamespace(
    identity=IDENTITY, identity_with_contents=IDENTITY, image_paths=(), num_train_images=6, num_reg_images=0,
    metadata=lambda options, batches: {}, image_plan=None,
)  # fmt: skip
CHARTS: Any = SimpleNamespace(are_on=False, log_step=lambda *_: None)
PREVIEWS: Any = SimpleNamespace(
    before_training=lambda _: True, are_due=lambda step: False, after_step=lambda *_: True,
    after_epoch=lambda *_: True, are_drawn=lambda *_: True,
)  # fmt: skip
VALIDATION: Any = SimpleNamespace(
    before_training=lambda _: False, after_step=lambda *_: False, is_due=lambda step: False, stop_reason=None,
    is_on=False, probe=SimpleNamespace(is_on=False), num_images=0, record=SimpleNamespace(measured_step=0),
)  # fmt: skip

TestRunStates = RunStates.TestCase
TestRunStates.settings = any_walk(num_examples=6, num_steps=8)

EVERY_STATE = {"steps": 2, "keeps": 1, "keeps_states": 6, "epochs": None, "saves_states": True}
BY_CLOCK = {**EVERY_STATE, "steps": None, "saves_states": False}
PATHS: dict[str, Sequence[Step]] = {
    "nothing": [],
    "killed": [("kill", {"number": number}) for number in (30, 60, 45, 90)],
    "stopped": [("stop", {"step": step}) for step in (3, 5, 11)],
    "stopped at the last step": [("stop", {"step": NUM_STEPS})],
    "stopped without other states": [("use_schedule", {**EVERY_STATE, "keeps_states": 1, "saves_states": False}),
                                     ("use_clock", {"minutes": None}), ("stop", {"step": 3}),
                                     ("kill_after", {"name": "mine-step00000008.safetensors"})],
    "by the clock": [("use_schedule", BY_CLOCK), ("use_clock", {"minutes": 1.0}), ("kill", {"number": 60}),
                     ("use_clock", {"minutes": 4.0}), ("kill", {"number": 30})],
    "by the clock, damaged": [("use_schedule", BY_CLOCK), ("use_clock", {"minutes": 1.0}),
                              ("kill_after", {"name": TIMED_STATES[0]}), ("damage", {"name": TENSOR_FILE}),
                              ("use_clock", {"minutes": 4.0}), ("kill", {"number": 40}),
                              ("use_clock", {"minutes": 1.0}), ("kill", {"number": 70})],
    "killed once its last state is whole": [("use_schedule", BY_CLOCK), ("use_clock", {"minutes": 1.0}),
                                            ("kill_after", {"name": "mine-state"})],
    "killed when longer than its last state": [("use_schedule", BY_CLOCK), ("use_clock", {"minutes": 1.0}),
                                               ("lengthen", {}), ("kill_after", {"name": TIMED_STATES[1]})],
    "killed between a file and its state": [("use_schedule", EVERY_STATE),
                                            ("kill_after", {"name": "mine-step00000008.safetensors"})],
    "damaged": [("stop", {"step": 5}), ("damage", {"name": TENSOR_FILE}), ("stop", {"step": 9}),
                ("damage", {"name": MANIFEST_FILE}), ("damage", {"name": NETWORK_FILE})],
    "disk full": [("fill_disk", {"first": 20, "count": 5}), ("kill", {"number": 200})],
    "disk full at the end": [("stop", {"step": 12}), ("fill_disk", {"first": 6, "count": 90})],
    "fewer processes": [("stop", {"step": 3}), ("use_processes", {"count": 2}), ("stop", {"step": 6}),
                        ("stop", {"step": 8}), ("use_processes", {"count": 1}), ("stop", {"step": 10}),
                        ("use_processes", {"count": 4})],
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_run_goes_on_exactly_on_a_path_where_it_once_might_not(path: Sequence[Step]) -> None:
    walk(RunStates(), path)
