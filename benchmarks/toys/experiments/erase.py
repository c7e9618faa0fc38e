"""Circles turned into squares on the toy base model (LECO), by the commands of benchmarks/toys/README.md: the share of
32 images with the right shape, and with the right colour. The other four shapes are preserved, but for the red squares
in other colours, sizes or on other backgrounds.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import read_shares
from tests.contracts.test_docs import TOYS
from tests.runs.docs_pages import run_commands

COLUMNS = ("right shape before", "after", "right colour before", "after")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    shares = read_shares(run_commands(TOYS, "toy_erase", folder, ["--seed", str(seed)]))
    return {caption: (*(s[k][0] for k in (0, 1)), *(s[k][1] for k in (0, 1))) for caption, s in shares.items()}
