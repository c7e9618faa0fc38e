"""Tiny SD3 models on disk."""

from pathlib import Path

import pytest

from tests.tiny.sd3 import build_tiny_sd3


@pytest.fixture(scope="session")
def sd3_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a single file with all text encoders and each part as a separate file next to it; do not modify them."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3"), seed=21)


@pytest.fixture(scope="session")
def sd3_without_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same weights with a single file that lacks the text encoders."""
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny_sd3_bare"), seed=21, with_text=False)
