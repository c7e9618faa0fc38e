"""The exit status of a command, and how its errors are printed. Imports no torch."""

import sys
from collections.abc import Callable, Sequence

from library.base.errors import UserError
from library.base.terminal import print_error, print_line
from library.environment.hidden_libraries import BITSANDBYTES, hide_library
from library.training.command_line.console import setup_plain_logging
from library.training.reporting.error_fields import print_json_error


def act(action: Callable[[], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `action`, print an error of the user or the system as one line, and return the exit status: 0 success, 1 user
    error, 130 interrupted, or the action's own. With --errors_json in `argv` (default: the process's arguments), also
    print the error as JSON."""
    setup_plain_logging()
    try:
        return _act(action, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print_line("stopped; no partial file was written", sys.stderr)
        return 130


def _act(action: Callable[[], int | None], argv: Sequence[str]) -> int:
    try:
        # diffusers imports it if it is installed, which takes 3 CPU s and prints a note about a missing kernel.
        with hide_library(BITSANDBYTES):
            return action() or 0
    except (UserError, OSError) as error:
        is_bug = isinstance(error, OSError) and (error.errno is None or error.filename is None)  # not from the system
        if not is_bug:
            print_error(error)
        print_json_error(error, argv)
        if is_bug:
            raise
        return 1
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        print_error(f"main memory ran out{reason}; close other programs, or use smaller files")
        print_json_error(error, argv)
        return 1
    except Exception as error:
        print_json_error(error, argv)
        raise
