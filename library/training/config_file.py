"""Command lines stored as TOML (`config_file`).

Front ends write every option they know into such a file, including empty ones, with the types of their own forms.
Values are therefore converted generously where only one meaning is possible; anything else is an error.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import error_in, naming, of_file
from library.base.suggestions import nearest_name
from library.options.config_file import read_toml
from library.options.kinds import int_or_float, is_number
from library.options.train import TrainOptions

CONFIG_FLAG = "--config_file"
SECRETS = tuple(name for name, declared in TrainOptions.declarations().items() if declared.secret)


@dataclass(frozen=True)
class Config:
    """The content of a config file."""

    path: Path
    values: Mapping[str, Any]  # by option name, converted to the option's type
    warnings: Sequence[str]


def config_path(config_file: str) -> Path:
    """Return the path of the config file; `.toml` may be omitted."""
    return Path(config_file if config_file.endswith(".toml") else config_file + ".toml")


def is_foreign(config_file: str) -> bool:
    """Return True if the name is that of a file as it is typed, without .toml; a bare name of a TOML file is not."""
    path = Path(config_file)
    return path.suffix.lower() != ".toml" and path.is_file() and not config_path(config_file).is_file()


def read_config(
    path: Path, actions: Mapping[str, argparse.Action], elsewhere: Callable[[str], str] = lambda option: ""
) -> Config:
    """Read a file's options by name; `actions` are the parser's, `elsewhere` describes other scripts' options.

    Tables are flattened by one level, ignoring their names. Keys that are not options are dropped, with a warning.
    Raises UserError.
    """
    warnings: list[str] = []
    raw_values = flatten(read_toml(path, CONFIG_FLAG), path, warnings)
    with naming(None, file=path):
        values = read_values(raw_values, str(path), actions, warnings, elsewhere)
    return Config(path, values, warnings)


def read_values(
    raw_values: Mapping[str, Any], where: str, actions: Mapping[str, argparse.Action], warnings: list[str],
    elsewhere: Callable[[str], str] = lambda option: "",
) -> dict[str, Any]:  # fmt: skip
    """Convert the options in `raw_values`, which were read from `where`, and append messages to `warnings`.

    Raises UserError for an invalid value.
    """
    values: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in raw_values.items():
        if key in ("config_file", "output_config"):
            continue  # an option about the file itself
        if key not in actions:
            other_scripts = elsewhere(key)
            if not other_scripts:
                unknown.append(key + nearest(key, actions))
            elif value is not False and value not in ("", []):  # front ends write every field
                warnings.append(f"{where}: ignored: {key}{other_scripts}")
            continue
        converted = convert(value, actions[key])
        if isinstance(converted, Refused):
            text = json.dumps(value, default=str)
            raise error_in(f"--{key}")(f"{where}: {key} is {text}, but --{key} takes {converted.wanted}")
        values[key] = converted
        if key == "max_token_length" and converted is not None:
            values[key] = to_whole_chunks(converted, where, warnings)
    if unknown:
        warnings.append(f"{where}: ignored, no such option: {', '.join(unknown)}")
    return values


def flatten(tables: Mapping[str, Any], path: Path, warnings: list[str]) -> dict[str, Any]:
    """Merge the keys of the top level and of its tables; later ones take precedence."""
    values: dict[str, Any] = {}
    for name, value in tables.items():
        section = value if isinstance(value, dict) else {name: value}
        for key, inner in section.items():
            if isinstance(inner, dict):
                raise of_file(path)(
                    f": [{name}.{key}] is a table inside a table; options go into the top level or into [{name}]"
                )
            if key in values and values[key] != inner:
                warnings.append(f"{path}: {key} is set to {values[key]!r} and again to {inner!r}; the later one counts")
            values[key] = inner
    return values


def nearest(key: str, actions: Mapping[str, argparse.Action]) -> str:
    """Suggest the option nearest to `key`, or return "". Other programs call a file's option `vae_path`."""
    stem = key.removesuffix("_path")
    near = stem if stem in actions else nearest_name(key, actions, least=0.75)
    return f" (nearest: {near})" if near else ""


def to_whole_chunks(max_token_length: int, where: str, warnings: list[str]) -> int | None:
    """Convert a caption length in tokens: captions are read in chunks of 75 tokens, and one chunk is the default."""
    if max_token_length < 75:
        raise error_in("--max_token_length")(f"{where}: max_token_length is {max_token_length}", "use 75, 150 or 225")
    rounded = max_token_length // 75 * 75
    if rounded != max_token_length:
        warnings.append(f"{where}: max_token_length {max_token_length} acts as {rounded}: chunks have 75 tokens")
    return rounded if rounded > 75 else None


@dataclass(frozen=True)
class Refused:
    """A value that an option cannot take."""

    wanted: str


def convert(value: Any, action: argparse.Action) -> Any:
    """Convert a file's value to the option's type; return Refused if that fails.

    `false`, an empty string and an empty list mean unset. Choices are not checked here, because some files contain
    names that the command line refuses.
    """
    if action.nargs == 0:
        return convert_flag(value, action.dest)
    if action.nargs in ("*", "+"):
        items = value if isinstance(value, list) else [] if value is False else [value]
        converted = [convert_scalar(item, action) for item in items if item != ""]
        return next((item for item in converted if isinstance(item, Refused)), converted or None)
    if value == "" or (value is False and (action.default is None or isinstance(action.default, str))):
        return action.default
    return convert_list(value, action) if isinstance(value, list) else convert_scalar(value, action)


def convert_list(value: list[Any], action: argparse.Action) -> Any:
    """Convert a list: dataset files have lists for two options that are text on the command line."""
    if action.dest == "resolution" and 1 <= len(value) <= 2 and all(type(side) is int for side in value):
        return ",".join(map(str, value))
    if action.dest == "face_crop_aug_range" and len(value) == 2 and all(type(end) in (int, float) for end in value):
        return ",".join(map(str, value))
    return None if value == [] and action.default is None else Refused("one value, not a list")


def convert_flag(value: Any, dest: str) -> Any:
    """Convert a flag: true or false, also as 1, 0 or text."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    words = {"": False, "false": False, "true": True}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, str) and dest == "dim_from_weights":
        return True  # front ends write the path of the weights
    return False if value == [] else Refused("true or false")


def convert_scalar(value: Any, action: argparse.Action) -> Any:
    kind = action.type
    has_number = is_number(value)
    if value is False and kind in (int, float, int_or_float):
        return kind(0) if kind in (int, float) else 0
    if kind is int:
        return int(value) if has_number and value == to_whole(value) else Refused("a whole number")
    if kind is float:
        # If the default is an int, metadata show the number as written.
        return (value if isinstance(action.default, int) else float(value)) if has_number else Refused("a number")
    if kind is int_or_float:
        return convert_steps(value)
    if isinstance(value, str) or has_number:
        return Path(value) if kind is Path and isinstance(value, str) else str(value)
    return Refused("text")


def convert_steps(value: Any) -> Any:
    """Convert a number of steps, or a share of the run."""
    # 100.0 means steps where a fraction of the run is impossible.
    if is_number(value) and value >= 0 and (value < 1 or value == to_whole(value)):
        return int(value) if value == to_whole(value) else value
    if isinstance(value, str):
        with suppress(argparse.ArgumentTypeError):
            return int_or_float(value)
    return Refused("a whole number of steps or a share of the run below 1.0")


def to_whole(value: int | float) -> int | None:
    """Return a number as an integer; None if it is not finite."""
    # inf - inf and NaN - NaN are NaN; `isfinite` would raise OverflowError for integers that no float holds.
    return int(value) if value - value == 0 else None


def write_config(path: Path, values: Mapping[str, Any]) -> None:
    """Write options to a new file, atomically. Raises UserError."""
    if path.exists():
        raise error_in("--output_config", path=path, cause="would be lost")(
            f"--output_config does not overwrite {path}", "remove it or name another --config_file"
        )
    write_whole(path, format_config(values))


def format_config(values: Mapping[str, Any]) -> str:
    """Return the TOML text of options, or of nested tables."""
    import toml

    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = basic_string
    text: str = toml.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}, encoder)
    return text


def basic_string(text: str) -> str:
    r"""Format a TOML string: JSON's escapes are valid in TOML except for DEL. toml's own writer breaks `\x` in
    paths."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
