"""The command of each run of a sweep, written out in full."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from library.base.errors import error_in
from library.options.train import TrainOptions
from library.training.config_file import SECRETS, format_config

OptionsT = TypeVar("OptionsT", bound=TrainOptions)

# Launchers start Python by themselves; other commands, such as nice, are given it.
START_PYTHON = (
    "accelerate",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
)
# Variables of a launcher's process, which would make a run that is started alone wait for others.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
            "ROLE_WORLD_SIZE", "ROLE_NAME")  # fmt: skip
OF_LAUNCHERS = ("MASTER_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "MV2_")  # beginnings of names
HIDDEN = "***"


@dataclass(frozen=True)
class Script(Generic[OptionsT]):
    """A training script, its options, and how it reads them."""

    path: Path
    actions: Mapping[str, argparse.Action]  # by option
    read: Callable[[Sequence[str]], OptionsT]  # exits with SystemExit for words that it refuses
    has_command: bool = True  # False for a program that calls a trainer, whose runs read a file


@dataclass(frozen=True)
class Command:
    """The words that start a run."""

    words: Sequence[str]
    shown: str  # for people, without keys and tokens


def write_command(script: Script[Any], options: TrainOptions, launcher: str | None, folder: Path) -> Command:
    """Return the command of a run with these options; options that no command line can hold go into a file in
    `folder`."""
    given = list_given(script, options)
    words = write_words(script.actions, given)
    if not script.has_command or not reads_back(script, words, options):
        words = ["--config_file", str(write_file(folder, options.saving.output_name or "run", given))]
    start = [*start_script(launcher), str(script.path)]
    secrets = {str(given[name]) for name in SECRETS if given.get(name)}
    hidden = [hide(word, secrets) for word in (*start, *words)]
    shown = subprocess.list2cmdline(hidden) if os.name == "nt" else shlex.join(hidden)
    return Command([*start, *words], shown)


def list_given(script: Script[Any], options: TrainOptions) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name."""
    left_out = ("config_file", "output_config", "recipe")  # `options` has their values
    values = {name: value for name, value in options.flat().items() if name in script.actions and name not in left_out}
    return {name: value for name, value in values.items() if value != script.actions[name].default}


def write_words(actions: Mapping[str, argparse.Action], given: Mapping[str, Any]) -> list[str]:
    """Write options as a command line."""
    words: list[str] = []
    for name, value in given.items():
        flag = actions[name].option_strings[0]
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            # In one word, so that a value may begin with a hyphen.
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def reads_back(script: Script[Any], words: Sequence[str], options: TrainOptions) -> bool:
    """Return True if the script reads these options from the words."""
    try:
        with open(os.devnull, "w") as nowhere:
            stderr, sys.stderr = sys.stderr, nowhere
            try:
                read = script.read(words)
            finally:
                sys.stderr = stderr
    except SystemExit:
        return False
    unread = {"config_file": None, "output_config": False, "recipe": None}
    same: bool = read.flat() | unread == options.flat() | unread
    return same


def write_file(folder: Path, name: str, given: Mapping[str, Any]) -> Path:
    """Write options to a file that only its owner can read, because they may hold tokens."""
    path = folder / f"{name}.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(format_config({name: value for name, value in given.items() if value is not None}))
    except OSError as error:
        raise error_in("--sweep")(f"--sweep: {path} cannot be written: {error.strerror}") from error
    return path


def start_script(launcher: str | None) -> list[str]:
    """Return the words before a script. Raises UserError for words that no shell can split."""
    try:
        words = shlex.split(launcher or "")
    except ValueError as error:
        raise error_in("--launcher")(f"--launcher {launcher!r} cannot be split into words: {error}") from error
    names = {Path(word).name for word in words}
    return words if names & {*START_PYTHON} else [*words, sys.executable]


def hide(word: str, secrets: set[str]) -> str:
    """Return a word without keys and tokens."""
    name, equals, value = word.partition("=")
    return HIDDEN if word in secrets else f"{name}={HIDDEN}" if equals and value in secrets else word


def environment_of_runs(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a run that is started alone, from that of the sweep."""
    return {
        name: value for name, value in variables.items() if name not in OF_RANKS and not name.startswith(OF_LAUNCHERS)
    }
