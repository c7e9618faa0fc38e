"""The parser of commands that are no training scripts.

An old Python must be able to parse this file, so annotations are quoted.
"""

import argparse
import sys
from typing import Any, NoReturn

from library.base.terminal import ERRORS_JSON, escape_text
from library.base.version import VERSION


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors repeat the user's words without letting them steer the terminal, and are also printed as
    JSON if --errors_json is typed."""

    def error(self, message: str) -> NoReturn:
        try:
            super().error(escape_text(message))
        finally:
            if ERRORS_JSON in sys.argv[1:]:
                from library.base.error_lines import ErrorFields, print_error_line  # not for an old Python

                print_error_line(ErrorFields(message, cause="wrong value"))


def add_errors_json(parser: argparse.ArgumentParser) -> None:
    """Add --errors_json, which `CommandParser` and `error_lines.fail` look for among the words typed."""
    help_text = "also print the error that ends the command as a line of JSON on standard error (docs/events.md)"
    parser.add_argument(ERRORS_JSON, action="store_true", help=help_text)


def make_parser(description: "str | None" = None, examples: str = "", **settings: Any) -> CommandParser:
    """Return a parser with --version and --errors_json that prints `examples` below its help."""
    epilog = f"examples:\n{examples}" if examples else None
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=description, epilog=epilog, formatter_class=layout, **settings)
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    add_errors_json(parser)
    return parser
