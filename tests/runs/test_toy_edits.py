"""The toy edit model learns from pairs to recolour shapes, which it has never seen, with the commands of the docs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.test_docs_commands import ROOT, commands_of

MOST_BEFORE, LEAST_AFTER = 0.1, 0.6


@pytest.mark.nightly
def test_recolouring_is_learned_from_pairs(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shares = []
    for command in commands_of(ROOT / "docs" / "paired_images.md"):
        if "toy_" in command:
            _, script, *words = shlex.split(command)
            done = subprocess.run(
                [sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800
            )
            assert done.returncode == 0, done.stderr
            shares += [int(right) / int(all) for right, all in re.findall(r"(\d+) of (\d+) edits", done.stdout)]
    before, after = shares
    assert before <= MOST_BEFORE and after >= LEAST_AFTER
