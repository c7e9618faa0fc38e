"""The destination of log lines: terminal, pipe or file."""

import io
import logging
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.base.errors import about
from library.base.launcher import launched_rank
from library.base.terminal import EscapedTexts
from library.base.version import NAME, VERSION
from library.options.output.console import ConsoleOptions

logger = logging.getLogger(__name__)

DATED = logging.Formatter("%(asctime)s %(levelname)-8s %(message)s", "%Y-%m-%d %H:%M:%S")
LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # the start of a line by `build_handler`
CONSOLE = "console of "  # prefix of the name of the handler that shows log lines


class PlainFormatter(logging.Formatter):
    """Formats the bare message; warnings and errors start with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname}: {text}"


NOISE = (
    ("bitsandbytes", "gemm_4bit"),  # a kernel that 8-bit optimizers do not use
    ("py.warnings", "FutureWarning"),
    ("py.warnings", "DeprecationWarning"),
)
"""(logger, words) of library messages that are meant for developers, not for users."""


class WithoutNoise(logging.Filter):
    """Keeps messages in `NOISE` off the terminal; a log file gets them."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(record.name.startswith(name) and words in record.getMessage() for name, words in NOISE)


class ForgivingFile(io.FileIO):
    """A file that discards what it cannot write, for output that must not end a run."""

    def write(self, data: Any, /) -> int:
        num_bytes = memoryview(data).nbytes
        try:
            num_written = super().write(data)
        except OSError:  # a full disk, a pipe without a reader, or a closed terminal
            return num_bytes
        return num_bytes if num_written is None else num_written  # None: the write would block


def forgive_write_errors() -> None:
    """Make this process's standard output and error ignore write errors."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started with this descriptor closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        # A stream that a program has replaced stays as it is.
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, forgiving(stream))


def forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Open a stream to the same file that ignores write errors; Windows consoles keep theirs, which supports
    Unicode."""
    if sys.platform == "win32" and stream.isatty():
        return stream
    # Text that is still buffered would otherwise appear after later lines.
    with suppress(OSError):
        stream.flush()
    # The replaced stream still owns the descriptor.
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
    """Log bare lines to standard error until `setup_logging` is called."""
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(f"{CONSOLE}a command")
    handler.addFilter(EscapedTexts())
    handler.addFilter(WithoutNoise())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def setup_logging(options: ConsoleOptions) -> None:
    """Configure logging as the options say, and make standard output and error UTF-8.

    A log file is truncated first, and errors also go to standard error. Simple logging prints plain lines to standard
    output. Otherwise lines go to standard error, coloured by rich on a terminal, one unwrapped line each in a pipe.
    Library messages that users cannot act on go to the file only, or are shown at level DEBUG. Repeated calls with the
    same options have no effect.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # UTF-8 also where the locale says otherwise, as in a pipe on Windows; PYTHONIOENCODING is the user's
            # choice. File names may hold bytes that are no text, which backslashreplace can still show.
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
        handler.addFilter(EscapedTexts())
        if not isinstance(handler, logging.FileHandler) and resolve_log_level(options) > logging.DEBUG:
            handler.addFilter(WithoutNoise())
        root.addHandler(handler)
    # Warnings of libraries become records of py.warnings, which NOISE filters and a log file keeps.
    logging.captureWarnings(True)
    root.setLevel(
        resolve_log_level(options) if launched_rank() == 0 else max(resolve_log_level(options), logging.ERROR)
    )


def start_run_log(options: ConsoleOptions) -> None:
    """Configure logging as `setup_logging` does, and log this suite's name and version.

    That is the first line of every run's log, because front ends start scripts from folders that several programs fill.
    """
    setup_logging(options)
    logger.info("%s %s", NAME, VERSION)


def resolve_log_level(options: ConsoleOptions) -> int:
    """Return the lowest level to show; the default is INFO, and the error that ends a run is always shown."""
    name = options.console_log_level or "INFO"
    level = logging.getLevelName(name)
    if not isinstance(level, int):
        raise about("--console_log_level")(f"is {name}", "use DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return min(level, logging.ERROR)


def is_log(path: Path) -> bool:
    """Return True for a log by this suite, and for a text named .log, as sd-scripts writes it."""
    from library.checkpoints.overwriting import read_start

    start = read_start(path)
    return LOG_LINE.match(start) is not None or (path.suffix == ".log" and b"\0" not in start)


def build_handlers(options: ConsoleOptions) -> list[logging.Handler]:
    """Build the handlers for a file, a terminal or a pipe. Raises UserError for a file that cannot be written."""
    if launched_rank() != 0:  # the main process logs for all; other ranks report errors only
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"process {launched_rank()}: %(levelname)s %(message)s"))
        return [handler]
    if options.console_log_file:
        # Archives and hashes cost a tenth of the time in which a command line is answered.
        from library.checkpoints.overwriting import FileKind, check_target

        path = Path(options.console_log_file)
        try:
            check_target("--console_log_file", path, FileKind("a log file", is_log))
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(path, mode="w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise about("--console_log_file", path)(f"cannot be written: {error.strerror}") from error
        file.setFormatter(DATED)
        # Front ends show standard error; with a log file alone, a failed run would leave them the exit status only.
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
        except Exception:
            pass  # missing or broken; rich only adds colour
        else:
            return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%Y-%m-%d %H:%M:%S")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(DATED)
    return handler
