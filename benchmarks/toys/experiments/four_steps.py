"""LoRAs of hearts on a step-distilled copy of the toy base model (`benchmarks/toys/make_distilled_toy.py`), drawn in
its four steps without guidance; rows and columns as in the table of the guidance-distilled copy.
"""

from pathlib import Path

from benchmarks.toys.experiments import SPLIT_COLUMNS
from benchmarks.toys.experiments.distilled import KEPT, Row, run_rows

COLUMNS = SPLIT_COLUMNS
COPY = "four_steps"
ROWS = {
    "copy for 4 steps": Row(COPY, None, "", 4),
    "plain": Row(COPY, COPY, "", 4),
    "preservation": Row(COPY, COPY, KEPT, 4),
    "preservation at 4 levels": Row(COPY, COPY, KEPT.replace("kept", "kept_4"), 4),
    "plain, on the toy base model": Row(COPY, "toy_base", "", 4),
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    return run_rows(ROWS, seed, folder)
