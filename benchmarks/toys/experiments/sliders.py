"""Sliders for size by the commands of benchmarks/toys/README.md, from prompts and from pairs of images: the share of 32
images with the shape, colour and background of the caption at strengths of -1, 0 and 1, and the rank correlation
(Spearman, 1 is 100 %) of strength and radius over strengths from -2 to 2.
"""

import re
from pathlib import Path

from benchmarks.toys.check_adapter import read_shares
from tests.contracts.test_docs import TOYS
from tests.runs.docs_pages import run_commands

COLUMNS = ("as asked at -1", "at 0", "at 1", "rank correlation")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    rows = {}
    for name in ("slider", "sizes"):
        printed = run_commands(TOYS, f"toy_{name}", folder, ["--seed", str(seed)])
        correlations = map(float, re.findall(r"strength and radius: (\S+),", printed))
        for (caption, shares), correlation in zip(read_shares(printed).items(), correlations, strict=True):
            source = "prompts" if name == "slider" else "pairs"
            rows[f"from {source}: {caption}"] = (*(shares[strength][2] for strength in (-1, 0, 1)), correlation)
    return rows
