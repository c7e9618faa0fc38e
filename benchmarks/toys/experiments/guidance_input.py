"""LoRAs of hearts on a copy of the toy base model with guidance as an input (`benchmarks/toys/make_distilled_toy.py`,
1,000 steps), drawn with an input of 3 and trained with the one that the row names; rows and columns as in the table of
the guidance-distilled copy. The input of 1.5 is interpolated from the files of 1 and 3.
"""

from pathlib import Path

from benchmarks.toys.experiments import SPLIT_COLUMNS
from benchmarks.toys.experiments.distilled import Row, run_rows

COLUMNS = SPLIT_COLUMNS
DRAWN_ON = "guidance_input/input_3"
ROWS = {
    "copy with guidance as an input, of 3": Row(DRAWN_ON, None),
    "input 1, plain": Row(DRAWN_ON, "guidance_input/input_1"),
    "input 1.5, `--guidance_loss 1.5`": Row(DRAWN_ON, "guidance_input/input_1.5", "--guidance_loss 1.5"),
    "input 3, plain": Row(DRAWN_ON, DRAWN_ON),
    "input 3, `--guidance_loss 3`": Row(DRAWN_ON, DRAWN_ON, "--guidance_loss 3"),
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    return run_rows(ROWS, seed, folder)
