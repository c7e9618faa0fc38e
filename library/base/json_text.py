"""Parsing of JSON from untrusted files."""

import json
import re
from typing import Any

PLACE = re.compile(r"line (\d+),? column (\d+)")  # as tomllib and json write it
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class InvalidJson(ValueError):
    """Text that is not JSON, or that contains values which cannot be written as UTF-8."""


def parse_json(text: str | bytes, allow_nan: bool = True) -> Any:
    r"""Parse a JSON text. Raises only InvalidJson, with the reason.

    Python's parser fails with RecursionError on deep nesting. It also accepts half of a surrogate pair ("\ud800"),
    which then fails at the first write to a UTF-8 file or terminal. `allow_nan` accepts NaN and Infinity, which are not
    JSON.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        value = json.loads(text, parse_constant=None if allow_nan else refuse_constant)
        # Writing the value again takes as long as reading it, so only texts with an escaped surrogate are checked.
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InvalidJson("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidJson("it contains half of a surrogate pair, such as \\ud800, which is not a character") from None
    except ValueError as error:
        raise InvalidJson(explain_parse_error(error)) from error
    return value


def explain_parse_error(error: Exception) -> str:
    """Return the reason why a text could not be parsed, without Python's advice on long numbers."""
    return "it has a number of thousands of digits" if "integer string conversion" in str(error) else str(error)


def find_place(error: Exception) -> str | None:
    """Return line and column of an error of tomllib or json, or None."""
    place = PLACE.search(str(error))
    return f"line {place[1]}, column {place[2]}" if place else None


def refuse_constant(name: str) -> None:
    raise InvalidJson(f"{name} is not a number in JSON")
