"""Fixtures of the tests of tools/front_end.py."""

from pathlib import Path

import pytest

from tests.unit.tools.small_suite import THEIRS, SmallSuite, build_small_suite, write_files


@pytest.fixture
def suite(tmp_path: Path) -> SmallSuite:
    """A small suite to install."""
    return build_small_suite(tmp_path / "suite")


@pytest.fixture
def gui(tmp_path: Path) -> Path:
    """A front end with sd-scripts."""
    write_files(tmp_path / "gui", THEIRS)
    return tmp_path / "gui"
