"""The exit status of a command, and how its errors are printed. Imports no torch."""

import sys
from collections.abc import Callable

from library.base.errors import UserError
from library.base.terminal import print_error, print_line
from library.environment.hidden_libraries import BITSANDBYTES, hide_library
from library.training.command_line.console import setup_plain_logging


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
        print_error(error)
        return 1
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        print_error(f"main memory ran out{reason}; close other programs, or use smaller files")
        return 1
    except KeyboardInterrupt:
        print_line("stopped; no partial file was written", sys.stderr)
        return 130
