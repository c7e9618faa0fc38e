"""How the error that ends a command is printed: one line, and with --errors_json its fields as JSON.

Every Python that the suite supports can import this file, without a package.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from library.base.errors import Cause, UserError
from library.base.launcher import launched_rank
from library.base.terminal import ERRORS_JSON, print_error, print_line

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


def read_fields(error: BaseException) -> ErrorFields:
    """Return the fields of an error; those of a bug are its type and text."""
    if isinstance(error, UserError):
        names = ("message", "remedy", "setting", "others", "file", "path", "place", "cause")
        return ErrorFields(**{name: getattr(error, name) for name in names})
    if isinstance(error, OSError) and error.filename is not None:
        return ErrorFields(str(error), path=os.fsdecode(error.filename), cause=CAUSES.get(type(error)))
    return ErrorFields(f"{type(error).__name__}: {error}")


def print_error_line(fields: ErrorFields) -> None:
    """Print the line of --errors_json to standard error, from the main process alone."""
    if launched_rank() == 0:
        print_line(json.dumps({"error": asdict(fields)}), sys.stderr)


def fail(error: Exception, words: Sequence[str] | None = None) -> int:
    """Print an error that ends a command, as JSON too if its command line (default: the process's) says so, and return
    the exit status."""
    print_error(error)
    if ERRORS_JSON in (sys.argv[1:] if words is None else words):
        print_error_line(read_fields(error))
    return 1
