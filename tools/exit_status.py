"""The exit status of a command, and how its errors are printed. Imports no torch."""

import sys
from collections.abc import Callable

from library.errors import UserError
from library.formatting import escape_controls
from library.hidden_libraries import BITSANDBYTES, hide_library
from library.training.command_line.console import LINES, setup_plain_logging


def act(action: Callable[[], int | None]) -> int:
    """Run `action`, print an error of the user or the system as one line, and return the exit status: 0 success, 1 user
    error, 130 interrupted, or the action's own."""
    setup_plain_logging()
    try:
        # diffusers imports it if it is installed, which takes 3 CPU s and prints a note about a missing kernel.
        with hide_library(BITSANDBYTES):
            return action() or 0
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is None):  # not from the system
            raise
        # Names in files may contain escape sequences, which must not reach the terminal.
        print(f"error: {escape_controls(str(error), keep=LINES)}", file=sys.stderr)
        return 1
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        print(f"error: main memory ran out{reason}; close other programs, or use smaller files", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no partial file was written", file=sys.stderr)
        return 130
