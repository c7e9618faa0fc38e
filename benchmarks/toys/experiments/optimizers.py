"""Optimizers in half of the quickstart's steps, each at one usual learning rate: not a ranking. Words are added to the
quickstart's command with `--max_train_steps 200`. Each cell is the share of images that show shape, colour, background
and style of their prompt: 84 hearts, and 21 of the known world.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.toys.experiments import compare

COLUMNS = ("hearts", "known world")
OPTIMIZERS: Mapping[str, str] = {
    "AdamW, the quickstart's": "",
    "AdamW in 8 bits": "--optimizer_type AdamW8bit",
    "Lion": "--optimizer_type Lion --learning_rate 2e-4",
    "Prodigy": "--optimizer_type Prodigy --learning_rate 1 --lr_warmup_steps 0",
    "Adafactor": "--optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False",
    "Muon": "--optimizer_type Muon --learning_rate 2e-3",
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    return compare(OPTIMIZERS, seed, folder, "--max_train_steps", "200")
