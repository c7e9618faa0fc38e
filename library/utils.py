"""What programs that import sd-scripts' library call by these names; nothing here calls it."""

import argparse
import logging


def setup_logging(args: argparse.Namespace | None = None, log_level: str | None = None, reset: bool = False) -> None:
    """Send log lines where the options of the console say; without `reset` only where they go nowhere yet."""
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


AS_IMPORTED = dict(globals())  # by which it is told what a program puts here that nothing uses
