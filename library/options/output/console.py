"""Options for the destination and level of log lines."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ConsoleOptions(Options, affects_training=False):
    """Destination and level of log lines."""

    console_log_level: str | None = option(None, usual=True, choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    """Least important messages to show, from DEBUG to CRITICAL, which shows errors too. Unset shows INFO and above."""
    console_log_file: str | None = option(None, path="new file")
    """File for the log messages; the terminal then shows errors only. Overwritten at the start of each run."""
    console_log_simple: bool = option(False, excludes={"log_events=-": "both write to standard output"})
    """Write messages as plain lines on standard output, without colour, time or wrapping. Useful in notebooks."""
    errors_json: bool = option(False)
    """Also print the error that ends the run as one line of JSON on standard error, for programs: the option, the file
    and the cause, as events.md in docs describes."""
