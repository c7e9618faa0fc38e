"""Where log lines go and how many of them."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ConsoleOptions(Options):
    """Where log lines go and how many of them."""

    console_log_level: str | None = option(None, help="", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    console_log_file: str | None = option(None, help="")
    console_log_simple: bool = option(False, help="")
