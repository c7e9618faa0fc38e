"""The fields of the error that ended a run, for the last event and the line of --errors_json."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from library.base.errors import Cause, UserError
from library.base.launcher import launched_rank
from library.base.terminal import print_line
from library.options.config_file import read_toml
from library.training.config_file import CONFIG_FLAG, SECRETS, config_path, flatten

HIDDEN = "***"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
CAUSES: Mapping[type[OSError], Cause] = {FileNotFoundError: "missing", PermissionError: "unreadable"}


@dataclass(frozen=True)
class ErrorFields:
    """The fields of a `UserError` as programs get them, by the last event and by --errors_json."""

    message: str  # for people; it may be reworded at any time
    remedy: str | None = None  # what to do, where the message does not say it
    setting: str | None = None  # the flag, key or argument to change: --vae, num_repeats, --network_args rank_dropout
    others: Sequence[str] = ()  # settings that it does not fit or needs
    file: str | None = None  # what the setting stands in; None for the command line
    path: str | None = None  # the file or folder that is wrong
    place: str | None = None  # where in the file: line and column, or a table
    cause: Cause | None = None  # values may be added; None: not known, or a bug


def describe_error(error: BaseException, values: Mapping[str, Any], paths: Collection[str]) -> ErrorFields:
    """Return the fields of an error, without the passwords in the options `values`.

    An error that names no setting is about the option in `paths` that its file belongs to, if there is one.
    """
    fields = ErrorFields(f"{type(error).__name__}: {error}")
    if isinstance(error, UserError):
        names = ("message", "remedy", "setting", "others", "file", "path", "place", "cause")
        fields = ErrorFields(**{name: getattr(error, name) for name in names})
    elif isinstance(error, OSError) and error.filename is not None:
        fields = ErrorFields(str(error), path=os.fsdecode(error.filename), cause=CAUSES.get(type(error)))
    setting = fields.setting or find_setting(fields.path, values, paths)
    return change_texts(replace(fields, setting=setting), lambda text: hide(text, values))


def change_texts(fields: ErrorFields, change: Callable[[str], str]) -> ErrorFields:
    """Return the fields with every text changed."""
    changed: dict[str, Any] = {k: change(v) if isinstance(v, str) else v for k, v in vars(fields).items()}
    return ErrorFields(**changed)


def find_setting(path: str | None, values: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return the flag of the option that names `path` or a folder that it is in, the nearest one; None if none does."""
    if path is None:
        return None
    given = {name: values[name] if isinstance(values[name], list) else [values[name]] for name in names & values.keys()}
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    above = [
        (len(folder.parts), f"--{name}")
        for name, texts in given.items()
        for folder in (Path(os.path.abspath(os.path.expanduser(str(text)))) for text in texts if text)
        if absolute.is_relative_to(folder)
    ]
    return max(above, default=(0, None))[1]


def list_secrets(values: Mapping[str, Any]) -> list[str]:
    """Return the passwords among option values and in the environment."""
    return [str(values[name]) for name in SECRETS if values.get(name)] + [
        os.environ[name] for name in SECRET_VARIABLES if os.environ.get(name)
    ]


def hide(text: str, values: Mapping[str, Any]) -> str:
    """Return a text without the passwords that it quotes."""
    for secret in list_secrets(values):
        text = text.replace(secret, HIDDEN)
    return text


def print_error_line(fields: ErrorFields) -> None:
    """Print the line of --errors_json to standard error, from the main process alone."""
    if launched_rank() == 0:
        print_line(json.dumps({"error": asdict(fields)}), sys.stderr)


def wants_error_line(words: Sequence[str]) -> bool:
    """Return True if a command line that cannot be read, or its config file, has --errors_json."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--errors_json", action="store_true")
    parser.add_argument(CONFIG_FLAG, nargs="?")
    with suppress(argparse.ArgumentError, UserError):
        typed = parser.parse_known_args(words)[0]
        if typed.errors_json or not typed.config_file:
            return bool(typed.errors_json)
        path = config_path(typed.config_file)
        return flatten(read_toml(path, CONFIG_FLAG), path, []).get("errors_json") is True
    return False
