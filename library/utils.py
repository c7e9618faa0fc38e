"""Functions of sd-scripts' library.utils for programs that import it; nothing here calls them."""

import argparse
import logging


def setup_logging(args: argparse.Namespace | None = None, log_level: str | None = None, reset: bool = False) -> None:
    """Configure logging by the console options; without `reset` only if it is not configured yet."""
    from library.options.output.console import ConsoleOptions
    from library.training.command_line import console

    root = logging.getLogger()
    if root.handlers and not reset:
        return
    root.handlers.clear()
    asked = {} if args is None else vars(args)
    options = ConsoleOptions.from_args(argparse.Namespace(**{**ConsoleOptions.defaults(), **asked}))
    console.setup_logging(options)
    if log_level is not None:
        root.setLevel(log_level)


AS_IMPORTED = dict(globals())  # to notice names that a program patches in without effect
