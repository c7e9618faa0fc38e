"""Preference optimization (DPO) toward red with 48 pairs, by the commands of benchmarks/toys/README.md: the share of 32
images that are red, and that have the right shape.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import read_shares
from tests.contracts.test_docs import TOYS
from tests.runs.docs_pages import run_commands

COLUMNS = ("red before", "after", "right shape before", "after")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    shares = read_shares(run_commands(TOYS, "toy_colours", folder, ["--seed", str(seed)]))
    return {
        caption: (before[1], after[1], before[0], after[0])
        for caption, (before, after) in ((caption, by_strength.values()) for caption, by_strength in shares.items())
    }
