"""Where the log lines of a run go: the terminal, a pipe or a file."""

import io
import logging
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.checkpoints.overwriting import FileType, check_overwrite
from library.errors import UserError
from library.formatting import escape_controls
from library.launcher import launched_rank
from library.options.output.console import ConsoleOptions

DATED = logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%Y-%m-%d %H:%M:%S")
LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # as `build_handler` has it begin
LOG = FileType("a log file", lambda start: LOG_LINE.match(start) is not None)
LINES = "\n\t"  # control characters that a message may have
CONSOLE = "console of "  # how the name of the one handler begins that shows log lines


class PlainFormatter(logging.Formatter):
    """The bare message; warnings and errors carry their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname}: {text}"


NOISE = (
    ("bitsandbytes", "gemm_4bit"),  # a kernel that 8-bit optimizers do not use
    ("py.warnings", "FutureWarning"),
    ("py.warnings", "DeprecationWarning"),
)
"""(logger, words): messages of libraries to their developers, which no user can act on."""


class WithoutNoise(logging.Filter):
    """Keeps `NOISE` off the terminal; a log file gets it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(record.name.startswith(name) and words in record.getMessage() for name, words in NOISE)


class EscapedControls(logging.Filter):
    """Writes control characters as escapes: a message may hold names from files that anyone made."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        escaped = escape_controls(text, keep=LINES)
        if escaped != text:
            record.msg, record.args = escaped, ()
        return True


class ForgivingFile(io.FileIO):
    """A file that discards what cannot be written, for output that must not end a run."""

    def write(self, data: Any, /) -> int:
        num_bytes = memoryview(data).nbytes
        try:
            num_written = super().write(data)
        except OSError:  # a full disk, a pipe without a reader, a terminal that is gone
            return num_bytes
        return num_bytes if num_written is None else num_written  # None: it would have to wait


def forgive_write_errors() -> None:
    """Replace standard output and error of this process by streams that ignore write errors."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started with this descriptor closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, forgiving(stream))


def forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Open a stream to the same file that ignores write errors; Windows consoles keep theirs, which takes Unicode."""
    if sys.platform == "win32" and stream.isatty():
        return stream
    with suppress(OSError):
        stream.flush()
    file: Any = ForgivingFile(stream.fileno(), "w", closefd=False)
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        file if is_unbuffered else io.BufferedWriter(file),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def setup_plain_logging() -> None:
    """Send bare lines to standard error, as commands do, until `setup_logging` says otherwise."""
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(f"{CONSOLE}a command")
    handler.addFilter(EscapedControls())
    handler.addFilter(WithoutNoise())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def setup_logging(options: ConsoleOptions) -> None:
    """Send log lines where the user wants them, line by line, and make standard output and error UTF-8.

    A log file wins and is emptied first, and errors go to standard error as well; simple logging gives plain lines on
    standard output; otherwise lines go to standard error, coloured by rich on a terminal and one
    unwrapped line each in a pipe, where programs read them. Messages of libraries that no user can act on go only to
    the file, or are shown at level DEBUG.
    Calling it again with the same options changes nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if "PYTHONIOENCODING" in os.environ else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace", line_buffering=True)
    root = logging.getLogger()
    name = f"{CONSOLE}{options!r}"
    if any(handler.name == name for handler in root.handlers):
        return
    for handler in [h for h in root.handlers if (h.name or "").startswith(CONSOLE)]:
        root.removeHandler(handler)
        handler.close()
    for handler in build_handlers(options):
        handler.set_name(name)
        handler.addFilter(EscapedControls())
        if not isinstance(handler, logging.FileHandler) and resolve_log_level(options) > logging.DEBUG:
            handler.addFilter(WithoutNoise())
        root.addHandler(handler)
    logging.captureWarnings(True)
    root.setLevel(
        resolve_log_level(options) if launched_rank() == 0 else max(resolve_log_level(options), logging.ERROR)
    )


def resolve_log_level(options: ConsoleOptions) -> int:
    """Return the lowest level that is shown; unset is INFO."""
    name = options.console_log_level or "INFO"
    level = logging.getLevelName(name)
    if not isinstance(level, int):
        raise UserError(f"--console_log_level is {name}; use DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return level


def build_handlers(options: ConsoleOptions) -> list[logging.Handler]:
    """Build the handlers for file, terminal or pipe. Raises UserError for a file that cannot be written."""
    if launched_rank() != 0:  # the main process says what all would say; of the others only errors are news
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"process {launched_rank()}: %(levelname)s %(message)s"))
        return [handler]
    if options.console_log_file:
        path = Path(options.console_log_file)
        try:
            if path.suffix != ".log":
                check_overwrite("--console_log_file", path, LOG)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"--console_log_file {path} cannot be written: {error.strerror}") from error
        file.setFormatter(DATED)
        errors = build_stderr_handler()
        errors.setLevel(logging.ERROR)
        return [file, errors]
    if options.console_log_simple:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(PlainFormatter())
        return [handler]
    return [build_stderr_handler()]


def build_stderr_handler() -> logging.Handler:
    """Return the handler for standard error: coloured by rich on a terminal, dated lines in a pipe."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.logging import RichHandler
        except ImportError:
            pass  # rich only adds colour; the lines below say the same
        else:
            return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%Y-%m-%d %H:%M:%S")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(DATED)
    return handler
