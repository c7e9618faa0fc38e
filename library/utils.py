"""Functions of sd-scripts' library.utils for programs that import it; nothing here calls them."""

import argparse
import logging


def setup_logging(args: argparse.Namespace | None = None, log_level: str | None = None, reset: bool = False) -> None:
    """Configure logging from the console options. Unless `reset` is set, an existing configuration is kept."""
    from library.options.output.console import ConsoleOptions
    from library.training.command_line import console

    root = logging.getLogger()
    if root.handlers and not reset:
        return
    root.handlers.clear()
    values = {} if args is None else vars(args)
    options = ConsoleOptions.from_args(argparse.Namespace(**{**ConsoleOptions.defaults(), **values}))
    console.setup_logging(options)
    if log_level is not None:
        root.setLevel(log_level)


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
