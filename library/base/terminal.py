"""Texts for a terminal, which names and texts from files must not steer.

An old Python must be able to parse this file, so annotations are quoted.
"""

import json
import logging
import re
import sys
from typing import Any, TextIO

ERRORS_JSON = "--errors_json"  # also print the error that ends a command as JSON
LINES = "\n\t"  # control characters that texts of several lines contain
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Terminals that obey these show a name in another order or on two lines; lone surrogates are no characters.
MISLEADING = re.compile(r"[\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    """Write control characters as escapes, except those in `keep`."""
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\x{ord(match[0]):02x}", text)


def escape_text(text: str) -> str:
    """Write as escapes what steers or misleads a terminal; line breaks and tabs stay."""
    return MISLEADING.sub(lambda match: f"\\u{ord(match[0]):04x}", escape_controls(text, keep=LINES))


def print_line(text: str, stream: "TextIO | None" = None, end: str = "\n") -> None:
    """Write an escaped text to `stream` (default: standard output) and flush it. Nothing else prints."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    # A console whose encoding lacks a character shows ? instead of ending the command.
    stream.write(escape_text(text).encode(encoding, errors="replace").decode(encoding) + end)
    stream.flush()


def print_json(value: "Any", indent: "int | None" = None) -> None:
    """Write a value to standard output as JSON in ASCII, which any terminal shows and any program reads."""
    print_line(json.dumps(value, indent=indent, default=str).replace("\x7f", "\\u007f"))


def print_error(error: "Exception | str") -> None:
    """Write an error that ends a command to standard error."""
    print_line(f"error: {error}", sys.stderr)


def ask(question: str) -> str:
    """Return the user's answer to an escaped question."""
    return input(escape_text(question))


class EscapedTexts(logging.Filter):
    """Escapes log records, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        escaped = escape_text(text)
        if escaped != text:
            record.msg, record.args = escaped, ()
        if record.exc_info and not record.exc_text:  # which formatters keep
            record.exc_text = escape_text(logging.Formatter().formatException(record.exc_info))
        return True
