"""The parser of commands that are no training scripts.

An old Python must be able to parse this file, so annotations are quoted.
"""

import argparse
from typing import Any, NoReturn

from library.base.terminal import escape_text
from library.base.version import VERSION


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors repeat the user's words without letting them steer the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(escape_text(message))


def make_parser(
    description: "str | None" = None, examples: str = "", kind: "type[CommandParser]" = CommandParser, **settings: Any
) -> CommandParser:
    """Return a parser with --version that prints `examples` below its help."""
    epilog = f"examples:\n{examples}" if examples else None
    layout = argparse.RawDescriptionHelpFormatter
    parser = kind(description=description, epilog=epilog, formatter_class=layout, **settings)
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    return parser
