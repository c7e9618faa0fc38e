"""The runs of train.py that are there, and which of them a command line goes on with."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from library.base.formatting import format_count
from library.checkpoints.overwriting import check_target, judge
from library.options.config_file import read_toml
from library.options.output.saving import SavingOptions
from library.train_photos.photos import digest_texts
from library.train_photos.plan import OUTPUT, TEXT_KIND, Files, RunOrder
from library.train_photos.record import Record
from library.training.config_file import CONFIG_FLAG, flatten
from library.training.saving.run_lock import run_lock
from library.training.saving.state import StateManifest
from library.training.saving.state_names import is_state_name
from tools.draw import SHEET


def make_record(order: RunOrder) -> Record:
    """Return the record of a run."""
    args, folders, trigger = order.args, order.folders, order.trigger
    photos = digest_texts(f"{folder.path} {folder.digest}" for folder in folders)
    subsets = [json.dumps([folder.describe(trigger), folder.captions]) for folder in folders]
    like = None if args.like is None else str(args.like.absolute())
    own = {"prediction": args.prediction, "like": like, "class_images": args.class_images or None}
    return Record(
        f"{format_count(len(order.photos), 'photo')} ({photos})",
        digest_texts(subsets),
        trigger.text,
        order.base.name,
        args.kind,
        {**order.given, **{name: value for name, value in own.items() if value is not None}},
        {name: value for name in ("steps", "minutes") if (value := getattr(args, name)) is not None},
    )


@dataclass(frozen=True)
class EarlierRun:
    """A run of train.py whose files are there."""

    files: Files
    record: Record

    @cached_property
    def state(self) -> StateManifest | None:
        return self.files.find_state()

    @property
    def step(self) -> int:
        return 0 if self.state is None else self.state.step

    @property
    def is_finished(self) -> bool:
        """True if the adapter is there and nothing is left to do for it."""
        is_trained = self.state is None or "end" in self.state.done
        has_sheet = any(self.files.folder.glob(f"{self.files.name}-strengths*/{SHEET}"))
        return self.files.adapter.exists() and is_trained and has_sheet

    @property
    def title(self) -> str:
        """Its name and how far it is. Raises UserError if its NAME.toml cannot be read."""
        values = flatten(read_toml(self.files.config, CONFIG_FLAG), self.files.config, [])
        return f"{self.files.name}, {self.step:,} of {max(int(values['max_train_steps']), self.step):,} steps"


def holding(files: Files) -> Any:
    """Keep other runs from writing the same files inside the block. Raises UserError if one does."""
    return run_lock(SavingOptions(output_dir=str(files.folder), output_name=files.name), "--name")


# --- names ---


def list_names(output_dir: Path | None, name: str) -> Iterator[Files]:
    """Yield the files of a name, and of the name with numbers."""
    for number in count(1):
        numbered = name if number == 1 else f"{name}-{number}"
        yield Files((output_dir or OUTPUT / numbered).absolute(), numbered)


def find_runs(names: Iterator[Files]) -> tuple[list[EarlierRun], Files]:
    """Return the runs that have the first names, and the files of the first name that is free."""
    runs: list[EarlierRun] = []
    for files in names:
        if is_free(files):
            return runs, files
        if (record := Record.read(files.config)) is not None:
            runs.append(EarlierRun(files, record))
    raise AssertionError("names never end")


def is_free(files: Files) -> bool:
    """Return True if nothing has this name but what a start that was cut off has left."""
    if files.config.exists() or any(judge(path, TEXT_KIND) == "foreign" for path in files.texts):
        return False
    names = files.names
    return not any(
        is_state_name(path.name, names.starts) or (path.suffix == files.adapter.suffix and names.has_stem(path.stem))
        for path in (files.folder.iterdir() if files.folder.is_dir() else ())
    )


def check_name(files: Files) -> None:
    """Raise UserError if the user's --name has files, and no run of this command that may go on."""
    if Record.read(files.config) is not None:
        return
    for path in files.texts:
        check_target("--name", path, TEXT_KIND)
    if not files.config.exists():
        check_target("--name", files.adapter, files.names.adapter_kind)


# --- the choice ---

Ask = Callable[[str, str], str]
"""Says a sentence, asks a question and returns the answer in lower case; "" without a terminal or a question."""


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    files: Files
    earlier: EarlierRun | None = None  # goes on, with the options of its NAME.toml
    origin: str = ""  # the state of another run that a new one begins with
    steps: int | None = None  # the length of a run that goes on, if it is not that of its NAME.toml


def choose_start(
    runs: Sequence[EarlierRun], free: Files, record: Record, steps: Callable[[], int | None], ask: Ask
) -> Start:
    """Return how the run of a command line begins.

    `steps` returns its length; None for one that was not typed. Raises UserError if the run to go on with is running.
    """
    related = [run for run in reversed(runs) if run.record.is_about_the_same(record)]
    same = [run for run in related if not run.record.differences(record)]
    unfinished = [run for run in same if not run.is_finished]
    changed = [run for run in related if run not in same and not run.is_finished]
    if same:
        run = unfinished[0] if unfinished else same[0]
        length = steps() if run.record.length != record.length else None
        return go_on(run, free, length, ask) if unfinished else follow(run, free, length, ask)
    return branch(changed[0], free, record, ask) if changed else Start(free)


def go_on(run: EarlierRun, free: Files, length: int | None, ask: Ask) -> Start:
    """Return how to go on with an unfinished run, to `length` if that is given. Raises UserError if it is running."""
    with holding(run.files):  # raises if a process is training it
        said = f"an unfinished run is there: {run.title}"
    if length is not None and length <= run.step:
        ask(f"{said}, more than {length:,}; this is a new run beside it, {free.name}", "")
        return Start(free)
    answer = ask(said, "continue [Enter], start anew [n]?")
    return Start(free) if answer in ("n", "no") else Start(run.files, run)


def follow(run: EarlierRun, free: Files, length: int | None, ask: Ask) -> Start:
    """Return how a run begins after a finished one, whose files stay: at its end, or anew unless it is longer."""
    if length is not None and run.state is not None and length > run.step:
        ask(f"{run.files.name} is finished: this run, {free.name}, goes on from its step {run.step:,}", "")
        return Start(free, origin=str(run.state.path))
    ask(f"{run.files.name} is finished and stays: this is a new run, {free.name}", "")
    return Start(free)


def branch(run: EarlierRun, free: Files, record: Record, ask: Ask) -> Start:
    """Return how a run begins beside an unfinished one that differs: anew, or from its state if the user wants that."""
    said = f"an unfinished run is there: {run.title}, but it differs: {'; '.join(run.record.differences(record))}"
    question = f"a new run {free.name} beside it [Enter], one that goes on from its step with these [c]?"
    goes_on = ask(said, question) == "c" and run.state is not None
    return Start(free, origin=str(run.state.path) if goes_on and run.state is not None else "")
