"""Measurements of tests are kept in their own folders."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
