"""CHANGELOG.md begins with the version that pyproject.toml and --version have."""

import re
from pathlib import Path

from library.base.version import VERSION

ROOT = Path(__file__).parents[2]


def test_the_first_entry_is_for_the_current_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions and versions[0] == VERSION


def test_paths_and_links_in_the_changelog_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tools|docs|configs)/[\w./]+)`|\]\((docs/[\w.]+)", text):
        assert (ROOT / (path[0] or path[1])).exists(), path
