"""A run's names as a state machine: whatever other programs put under them or change, before or during the run, is
kept, and the run's own adapter is written whole."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from library.training.command_line.targets import check_targets
from library.training.saving.names import Names
from library.training.saving.state import NETWORK_FILE
from tests.fuzz.budget import Step, any_walk, walk
from tests.fuzz.test_run_states import BY_CLOCK, EVERY_STATE, NUM_STEPS, PER_STEP, TIMED_STATES, RunStates
from tests.unit.training.test_loop import run_of

ADAPTERS = tuple(f"mine{end}.safetensors" for end in ("", "-000001", "-000002", "-step00000004", "-step00000008"))
STATES = ("mine-state", "mine-000001-state", "mine-step00000004-state", "mine-step00000008-state", *TIMED_STATES)
places, forms, moments = st.sampled_from(ADAPTERS + STATES), st.sampled_from(("tensors", "text")), st.integers(1, 17)


class OutputNames(RunStates):
    """A run, and the files that other programs put into its folder."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[bytes] = []
        self.during: dict[int, list[Callable[[], None]]] = {}  # by step
        self.is_taken = False  # another program has replaced or changed the adapter of a finished run

    @precondition(lambda self: len(self.lengths) == 1)
    @rule()
    def lengthen(self) -> None:
        super().lengthen()
        self.is_taken = False

    @rule(name=places, form=forms)
    def put(self, name: str, form: str) -> None:
        """Replace what has a name by a file of another program, or by a folder of its files if it is a state's."""
        path = self.out / name
        self.out.mkdir(parents=True, exist_ok=True)
        replaced = [path, *path.rglob("*")] if path.exists() else []
        contents = [file.read_bytes() for file in replaced if file.is_file()]
        self.foreign = [content for content in self.foreign if content not in contents]
        self.saved.pop(name, None)
        self.is_full |= name in STATES  # states have other names
        self.is_taken |= name == ADAPTERS[0] and bool(contents)
        text = f"of another program, {len(self.foreign)}, {name}"
        if name in STATES:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            path = path / ("notes.txt" if form == "text" else NETWORK_FILE)
        if form == "text":
            path.write_text(text)
        else:
            save_safetensors(str(path), {"weight": torch.ones(1)}, {"made_by": text})
        self.foreign.append(path.read_bytes())

    @rule(name=st.sampled_from(ADAPTERS))
    def change(self, name: str) -> None:
        """Change the values of a file that the run has saved, as editors of adapters do."""
        path = self.out / name
        if path.is_file() and path.read_bytes() not in self.foreign:
            self.is_taken |= name == ADAPTERS[0]
            values = {"weight": torch.tensor(100.0 + len(self.foreign))}
            save_safetensors(str(path), values, read_metadata(path))
            self.foreign.append(path.read_bytes())

    @rule(name=places, form=forms, step=moments)
    def put_during(self, name: str, form: str, step: int) -> None:
        self.during.setdefault(step, []).append(lambda: self.put(name, form))

    @rule(name=st.sampled_from(ADAPTERS), step=moments)
    def change_during(self, name: str, step: int) -> None:
        self.during.setdefault(step, []).append(lambda: self.change(name))

    @invariant()
    def nothing_foreign_is_lost(self) -> None:
        held = {path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        assert held >= set(self.foreign)

    def start(self, stop: int | None, reads: str) -> None:
        """Start as the command does, after moving away what it refuses to replace."""
        values = {**self.options, "output_dir": str(self.out), "output_name": "mine", "autoresume": True}
        options = run_of(batches=(), **values).options
        while (refused := self.find_refused(options)) is not None:
            place = self.root / f"moved-{len(list(self.root.glob('moved-*')))}"
            refused.rename(place)
        super().start(stop, reads)

    def find_refused(self, options: Any) -> Path | None:
        try:
            check_targets(options, Names.build(options.saving))
        except UserError as error:
            (path,) = (self.out / name for name in ADAPTERS + STATES if f"{self.out / name} exists" in str(error))
            return path
        return None

    def draws(self) -> Any:
        plain = super().draws()

        def iterate_epoch(epoch: int, indices: Sequence[int], *others: object) -> Iterator[Any]:
            for index, batch in zip(indices, plain.iterate_epoch(epoch, indices, *others), strict=True):
                if index % PER_STEP == 0:
                    for action in self.during.pop(5 * (epoch - 1) + index // PER_STEP + 1, ()):
                        action()
                yield batch

        return SimpleNamespace(**{**vars(plain), "iterate_epoch": iterate_epoch})

    def finish(self) -> None:
        """Finish the run: an adapter of its own has the values of the run that nothing has happened to."""
        self.run()
        self.nothing_foreign_is_lost()
        with self.undisturbed() as whole:
            expected = load_state_dict(whole.out / "mine.safetensors")["weight"]
        own = [path for path in self.out.glob("mine*.safetensors") if path.read_bytes() not in self.foreign]
        assert self.is_taken or any(torch.equal(load_state_dict(path)["weight"], expected) for path in own)
        assert not [path for path in self.out.iterdir() if path.name.startswith(".")]


TestOutputNames = OutputNames.TestCase
TestOutputNames.settings = any_walk(num_examples=6, num_steps=8)

PATHS: dict[str, Sequence[Step]] = {
    "text before the run": [("put", {"name": name, "form": "text"}) for name in ADAPTERS],
    "adapters before the run": [("put", {"name": name, "form": "tensors"}) for name in ADAPTERS],
    "folders before the run": [("put", {"name": name, "form": "tensors"}) for name in STATES],
    "files during the run": [("put_during", {"name": "mine.safetensors", "form": "tensors", "step": 12}),
                             ("put_during", {"name": "mine-step00000008.safetensors", "form": "text", "step": 5})],
    "folders during the run": [("use_schedule", EVERY_STATE),
                               ("put_during", {"name": "mine-step00000004-state", "form": "text", "step": 3}),
                               ("put_during", {"name": "mine-state", "form": "tensors", "step": 9})],
    "a state by the clock": [("use_schedule", BY_CLOCK), ("use_clock", {"minutes": 1.0}),
                             ("put_during", {"name": TIMED_STATES[0], "form": "text", "step": 8})],
    "changed before it is outdated": [("use_schedule", {**EVERY_STATE, "keeps": 1}),
                                      ("change_during", {"name": "mine-step00000004.safetensors", "step": 6})],
    "changed before a longer run": [("lengthen", {}), ("stop", {"step": NUM_STEPS}),
                                    ("change", {"name": "mine.safetensors"})],
    "replaced after a stop": [("use_schedule", EVERY_STATE), ("stop", {"step": 9}),
                              ("put", {"name": "mine-step00000008-state", "form": "tensors"})],
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_nothing_is_lost_on_a_path_where_it_once_might_be(path: Sequence[Step]) -> None:
    states = OutputNames()
    walk(states, path, states.nothing_foreign_is_lost)
