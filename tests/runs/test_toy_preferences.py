"""DPO on the toy base model of the quickstart, with the commands of the docs, judged by the pixels of what it draws."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from tests.contracts.test_docs_commands import ROOT, commands_of

LEAST_GAIN = 30.0  # percentage points


@pytest.mark.nightly
def test_the_preferred_colour_is_drawn_more_often(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shares = []
    for command in commands_of(ROOT / "docs" / "preferences.md"):
        if "toy_colours" in command:
            _, script, *words = shlex.split(command)
            done = subprocess.run(
                [sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800
            )
            assert done.returncode == 0, done.stderr
            shares += re.findall(r"strength +([01]): shape \S+, colour (\S+)%", done.stdout)
    before, after = ([float(share) for strength, share in shares if strength == at] for at in "01")
    assert len(before) == len(after) == 5
    assert mean(after) - mean(before) >= LEAST_GAIN
