"""An edit model that learns "make the shape red" from 256 pairs, by the commands of benchmarks/toys/README.md: the
share of 60 edits, of images outside the training data, that are right, and that are right in one respect.
"""

import re
from pathlib import Path

from tests.contracts.test_docs import TOYS
from tests.runs.docs_pages import run_commands

COLUMNS = ("right", "shape", "colour", "background", "place")
LINE = r"(\d+) of (\d+) edits are right \(shape (\d+), colour (\d+), background (\d+), place (\d+)\)"


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    printed = run_commands(TOYS, "toy_(edits|asked|recolour)", folder, ["--seed", str(seed)])
    rows = {}
    for row, found in zip(("before", "after"), re.findall(LINE, printed), strict=True):
        right, count, *parts = map(int, found)
        rows[row] = tuple(number / count for number in (right, *parts))
    return rows
