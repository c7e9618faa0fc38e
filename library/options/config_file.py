"""Options kept in a TOML file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import UserError, about, error_in, naming
from library.base.json_text import InvalidJson, explain_parse_error, find_place, parse_json
from library.options.base import Options, option
from library.options.encodings import decode_utf8


@dataclass(frozen=True)
class ConfigFileOptions(Options, affects_training=False):
    """Options kept in a TOML file."""

    config_file: str | None = option(None, path="file", usual=True)
    """TOML file with options, one "name = value" a line; .toml may be left out. Sections only group lines, and the
    command line overrides the file. A file of another trainer is translated (docs: come_over)."""
    recipe: str | None = option(None, usual=True)
    """Name of a recipe, which holds the options of a usual training; --config_file and the command line win. recipes.py
    among the tools lists the names."""
    yes: bool = option(False)
    """Train with what --config_file of another trainer becomes here. Without it the options are only shown."""
    output_config: bool = option(False, usual=True)
    """Write the options of this command line that differ from their defaults into the file named by --config_file, and
    end. An existing file is not overwritten."""


# The standard library has tomllib since Python 3.11.
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


MOST_BITS = 1023  # of an integer that converts to a float
BACKSLASH_HINT = "a backslash in double quotes begins a special character: write paths with / or in single quotes"


def read_text(path: Path, flag: str) -> str:
    """Return the text of a UTF-8 file without its byte order mark; `flag` is the option that names the file. Raises
    UserError if it is missing, unreadable, or in another encoding."""
    if not path.is_file():
        raise error_in(flag, path=path, cause="missing")(f"{flag} is {path}, but there is no such file")
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; change its permissions"
        raise about(flag, path, cause="unreadable")(reason) from error
    with naming(flag, path, cause="unreadable"):
        return decode_utf8(content, f"{flag} {path}")


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """Return the tables of a UTF-8 TOML file, with or without a byte order mark; `flag` is the option that names the
    file.

    Raises UserError if the file is missing or unreadable, or with line and column of a mistake.
    """
    text = read_text(path, flag)
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone: an integer of more than 4,300 digits
        # tomllib's words for the backslashes of Windows paths: most are unescaped, that of \Users begins a hex value.
        is_about_backslash = any(words in str(error) for words in ("Unescaped", "Invalid hex value"))
        hint = "; " + BACKSLASH_HINT if is_about_backslash else ""
        reason = f"is not valid TOML: {explain_parse_error(error)}{hint}"
        raise about(flag, path, place=find_place(error), cause="unreadable")(reason) from None
    with naming(flag, path):
        refuse_unusable(tables, f"{flag} {path}")
    return tables


def read_json(path: Path, flag: str) -> Any:
    """Return the content of a UTF-8 JSON file, None if it is empty; `flag` is the option that names the file. Raises
    UserError as `read_toml` does."""
    text = read_text(path, flag)
    try:
        return parse_json(text) if text.strip() else None
    except InvalidJson as error:
        raise about(flag, path, place=find_place(error), cause="unreadable")(f"is not valid JSON: {error}") from None


def refuse_unusable(value: Any, origin: str) -> None:
    """Raise UserError if nested tables and lists have a string with NUL, which ends a path for the system, or an
    integer that no float holds, such as a hexadecimal one of thousands of digits."""
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{origin} has a NUL character in a text: {value[:60]!r}", "remove it")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise UserError(f"{origin} has a number of more than 300 digits", "use a smaller one")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            refuse_unusable(item, origin)
