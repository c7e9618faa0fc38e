"""tools/command.py: what every command does around its work."""

import argparse
import importlib.util
import logging
import sys

import pytest

from library.options.output.console import ConsoleOptions
from library.training.command_line.console import setup_logging
from tools.command import run

NAME = "bitsandbytes"


def test_a_command_does_not_import_a_library_that_it_never_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers imports bitsandbytes where it finds it, which takes seconds and writes lines about kernels."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found = []
    parser = argparse.ArgumentParser()
    assert run(parser, lambda _: found.append(importlib.util.find_spec(NAME)), []) == 0
    assert found == [None]
    assert NAME not in sys.modules


def test_a_line_is_shown_once_where_a_command_takes_options_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own

    def act(_: argparse.Namespace) -> None:
        logging.getLogger("tools").info("before")
        setup_logging(ConsoleOptions())
        logging.getLogger("tools").info("after")

    assert run(argparse.ArgumentParser(), act, []) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in told] == ["before", "after"]
