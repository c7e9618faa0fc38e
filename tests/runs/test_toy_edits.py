"""The toy edit model learns from pairs to recolour shapes, a new task, with the documented commands."""

import re
from pathlib import Path

import pytest

from tests.contracts.test_docs_commands import TOYS
from tests.runs.docs_pages import run_commands

MOST_BEFORE, LEAST_AFTER = 0.1, 0.5  # 0.03 and 0.60 to 0.65 over three seeds


@pytest.mark.nightly
def test_recolouring_is_learned_from_pairs(tmp_path: Path) -> None:
    printed = run_commands(TOYS, "toy_(edits|asked|recolour)", tmp_path)
    before, after = (int(right) / int(all) for right, all in re.findall(r"(\d+) of (\d+) edits", printed))
    assert before <= MOST_BEFORE and after >= LEAST_AFTER
