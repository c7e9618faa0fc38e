"""Destinations of log lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.options.output.console import ConsoleOptions
from library.training.command_line.console import resolve_log_level

ROOT = Path(__file__).parents[3]
CODE = """
import logging
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
for _ in range(2):
    setup_logging(ConsoleOptions({level!r}, {file!r}, {simple}))
logger = logging.getLogger("a")
logger.debug("detail")
logger.info("\\u5b66\\u7fd2 " + "x" * 200)
logger.warning("careful")
logger.warning("red \\x1b[31m%s", "\\x07")
"""
LONG = "学習 " + "x" * 200
ESCAPED = r"red \x1b[31m\x07"  # control characters in names and texts from files


def run(level: str | None = None, file: str | None = None, simple: bool = False) -> tuple[list[str], list[str]]:
    """Return the lines on standard output and standard error of a process with an ASCII-only locale."""
    code = CODE.format(level=level, file=file, simple=simple)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, check=True)
    return done.stdout.decode("utf-8").splitlines(), done.stderr.decode("utf-8").splitlines()


def test_lines_in_a_pipe_go_to_standard_error_once_and_unwrapped() -> None:
    out, err = run()
    assert out == []
    assert [line.split(maxsplit=3)[2:] for line in err] == [
        ["INFO", LONG],
        ["WARNING", "careful"],
        ["WARNING", ESCAPED],
    ]


def test_simple_lines_go_to_standard_output() -> None:
    assert run(simple=True) == ([LONG, "WARNING: careful", f"WARNING: {ESCAPED}"], [])


def test_the_level_decides_which_lines_are_shown() -> None:
    assert run(level="ERROR") == ([], [])
    assert run(level="DEBUG", simple=True)[0][0] == "DEBUG: detail"


def test_the_log_file_gets_the_lines_and_is_truncated_first(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    path.parent.mkdir()
    path.write_text("old\n", encoding="utf-8")
    assert run(file=str(path), simple=True) == ([], [])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and lines[2].endswith(ESCAPED) and lines[0].endswith(LONG) and "WARNING" in lines[1]


def test_errors_go_to_the_file_and_once_to_standard_error(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    code = f"""
import logging
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
setup_logging(ConsoleOptions(None, {str(path)!r}, True))
logging.warning("careful")
logging.error("it broke")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith("ERROR    it broke") and done.stdout == ""
    assert path.read_text(encoding="utf-8").splitlines()[1] == line


def test_an_unknown_level_in_a_config_file_is_refused() -> None:
    with pytest.raises(ValueError, match="--console_log_level is LOUD"):
        resolve_log_level(ConsoleOptions(console_log_level="LOUD"))


@pytest.mark.parametrize(("level", "place"), [("None", "file"), ("'DEBUG'", "terminal"), ("None", "nowhere")])
def test_lines_that_nobody_can_act_on_go_to_the_file_only(tmp_path: Path, level: str, place: str) -> None:
    path = tmp_path / "log.txt" if place == "file" else None
    code = f"""
import logging, warnings
from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
setup_logging(ConsoleOptions({level}, {None if path is None else str(path)!r}, False))
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from somewhere")
logging.getLogger("bitsandbytes.optim").warning("this matters")
warnings.warn("old name", FutureWarning)
warnings.warn("mind this", UserWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = done.stderr if path is None else path.read_text(encoding="utf-8")
    assert "this matters" in shown and "mind this" in shown
    assert ("gemm_4bit" in shown, "old name" in shown) == (place != "nowhere",) * 2
