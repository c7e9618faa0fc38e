"""DPO on the quickstart's toy base model with the documented commands, judged by the pixels of its images."""

import re
from pathlib import Path
from statistics import mean

import pytest

from tests.contracts.test_docs_commands import TOYS
from tests.runs.docs_pages import run_commands

LEAST_GAIN = 30.0  # percentage points


@pytest.mark.nightly
def test_the_preferred_colour_is_drawn_more_often(tmp_path: Path) -> None:
    printed = run_commands(TOYS, "toy_colours", tmp_path)
    shares = re.findall(r"strength +([01]): shape \S+, colour (\S+)%", printed)
    before, after = ([float(share) for strength, share in shares if strength == at] for at in "01")
    assert len(before) == len(after) == 5
    assert mean(after) - mean(before) >= LEAST_GAIN
