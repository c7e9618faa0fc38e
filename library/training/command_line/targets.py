"""Checks before a run that its saves replace no input and nothing that another command wrote."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.overwriting import FileKind, check_not_input, check_target
from library.options.base import Options
from library.training.report_page.page import report_kind
from library.training.reporting.events import SavedFor
from library.training.reporting.profile import PROFILE
from library.training.saving.names import Names
from library.training.saving.state import newest_state
from library.training.saving.state_names import STATE, TIMED, is_state_name

FLAG = "--output_name:"


def check_targets(options: Options, names: Names) -> None:
    """Raise UserError if the run would replace one of its inputs, or what no run of this name wrote."""
    inputs, values = find_input_files(options), options.flat()
    for input_path in inputs:
        # Every save writes a file of the run's name with a step or an epoch, so inputs of such names would be lost too.
        is_of_run = names.has_stem(input_path.stem) and input_path.suffix == names.of_end().suffix
        if not is_of_run or input_path.parent.resolve() != names.folder.resolve():
            continue
        # A resumed run takes its weights from the state and reads only the shapes of an adapter file.
        if str(input_path) != str(values["network_weights"]) or not goes_on(values, names):
            check_not_input(FLAG, input_path, [input_path])
    for name, declared in type(options).declarations().items():
        if declared.path == "new file" and values[name]:
            check_not_input(f"--{name}", Path(values[name]), inputs)
    for path, kind in list_saves(values, names):
        check_target(FLAG, path, kind)
    has_report = not values["no_report"]
    for path, kind, is_written in (
        (names.of_report(), report_kind(names.output_name), has_report),
        (names.of_profile(), PROFILE, values["profile"]),
    ):
        if is_written:
            check_target(FLAG, path, kind, inputs)


def goes_on(values: Mapping[str, Any], names: Names) -> bool:
    """Return True if the run continues from a state."""
    may_resume = values["autoresume"] or values["skip_finished"]
    return bool(values["resume"] or (may_resume and newest_state(names.folder, names.starts) is not None))


def list_saves(values: Mapping[str, Any], names: Names) -> Iterator[tuple[Path, FileKind]]:
    """Yield the existing files and folders that scheduled saves of the run may replace, each with the kind to expect.

    How many steps and epochs there are is not known yet, so any number counts.
    """
    weights, states = scheduled_saves(values)
    for entry in sorted(names.folder.iterdir()) if names.folder.is_dir() else ():
        if entry.suffix == names.of_end().suffix and names.has_stem(entry.stem):
            if names.find_purpose(entry) in weights:
                yield entry, names.adapter_kind
        elif is_state_name(entry.name, names.starts):
            stem = entry.name.removesuffix(STATE)
            purpose = names.find_purpose(names.folder / f"{stem}{names.of_end().suffix}")
            if values["save_every_n_minutes"] if stem.endswith(TIMED) else purpose in states:
                yield entry, names.state_kind


def scheduled_saves(values: Mapping[str, Any]) -> tuple[set[SavedFor], set[SavedFor]]:
    """Return the purposes for which the run saves weights, and those for which it saves states."""
    scheduled: set[SavedFor] = {"step"} if values["save_every_n_steps"] else set()
    if values["save_every_n_epochs"] or values["save_n_epoch_ratio"]:
        scheduled.add("epoch")
    ends = values["save_state"] or values["save_state_on_train_end"] or values["autoresume"]
    states: set[SavedFor] = {"end"} if ends else set()
    best: set[SavedFor] = {"best"} if values["keep_best_checkpoint"] else set()
    return {"end", *scheduled, *best}, states | (scheduled if values["save_state"] else set())


def find_input_files(options: Options) -> list[Path]:
    outputs = {name for name, declared in type(options).declarations().items() if declared.path == "new file"}
    values = [value for name, value in options.flat().items() if name not in outputs]
    candidates = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return [Path(text) for text in candidates if isinstance(text, str | Path) and os.path.isfile(text)]
