"""tools/command.py: what every command does around its work."""

import argparse
import importlib.util
import sys

import pytest

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
