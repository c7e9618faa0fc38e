"""The fields of the error that ended a run, for the last event and the line of --errors_json."""

import argparse
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.base.error_lines import ErrorFields, print_error_line, read_fields
from library.base.errors import UserError
from library.base.terminal import ERRORS_JSON
from library.options.config_file import read_toml
from library.options.toml_lines import find_line
from library.training.config_file import CONFIG_FLAG, SECRETS, config_path, flatten

HIDDEN = "***"
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")


def describe_error(error: BaseException, values: Mapping[str, Any], paths: Collection[str]) -> ErrorFields:
    """Return the fields of an error, without the passwords in the options `values`.

    An error that names no setting is about the option in `paths` that its file belongs to, if there is one.
    """
    fields = read_fields(error)
    setting = fields.setting or find_setting(fields.path, values, paths)
    return change_texts(locate(replace(fields, setting=setting)), lambda text: hide(text, values))


def locate(fields: ErrorFields) -> ErrorFields:
    """Return the fields with the line of the setting in its TOML file as the place, where the file shows it."""
    if fields.setting is None or fields.file is None or not fields.file.endswith(".toml"):
        return fields
    line = find_line(Path(fields.file), fields.setting, fields.place)
    return fields if line is None else replace(fields, place=f"line {line}")


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


def print_json_error(error: BaseException, words: Sequence[str]) -> None:
    """Print the line of --errors_json if the command line or its config file asks for it."""
    if wants_error_line(words):
        print_error_line(describe_error(error, {}, ()))


def wants_error_line(words: Sequence[str]) -> bool:
    """Return True if a command line that cannot be read, or its config file, has --errors_json."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(ERRORS_JSON, action="store_true")
    parser.add_argument(CONFIG_FLAG, nargs="?")
    with suppress(argparse.ArgumentError, UserError):
        typed = parser.parse_known_args(words)[0]
        if typed.errors_json or not typed.config_file:
            return bool(typed.errors_json)
        path = config_path(typed.config_file)
        return flatten(read_toml(path, CONFIG_FLAG), path, []).get("errors_json") is True
    return False
