"""CONTRIBUTING.md sends readers to files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where things are")[2]
NAMED = sorted({path for path in re.findall(r"`((?:library|networks|tests|docs|tools)/[\w./]+)`", TABLE)})


def test_the_table_names_files() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize("path", NAMED)
def test_named_files_exist(path: str) -> None:
    place = ROOT / path
    assert any(place.iterdir()) if path.endswith("/") else place.stat().st_size > 0
