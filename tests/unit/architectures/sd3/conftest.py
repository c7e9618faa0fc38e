"""Tiny SD3 models on disk."""

from pathlib import Path

import pytest

from tests.tiny.sd3 import build_tiny_sd3


@pytest.fixture(scope="session")
def sd3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A combined single file with its text encoders inside, and each part as a file of its own beside it; read only."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"), seed=21)


@pytest.fixture(scope="session")
def sd3_without_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the weights without the text encoders in the single file."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3_bare"), seed=21, with_text=False)
