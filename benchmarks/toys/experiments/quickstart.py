"""The quickstart's training, on 32 images of hearts, without changes. Shares of images that show shape, colour,
background and style of their prompt: of the 24 prompts that the quickstart draws, of which 10 are combinations of words
that no training caption has, of 64 hearts whose combination was trained, of 20 new ones, and of 84 prompts of the known
world; of those 84 the images that show what the base model draws there, and their mean difference from what it draws,
of the range of a pixel.
"""

from pathlib import Path

from benchmarks.toys.experiments import BASE, SPLIT_COLUMNS, count_shares, measure_split, train
from library.checkpoints.files import load_state_dict
from tools import start
from tools.quickstart.sampling import read_prompts

COLUMNS = ("the quickstart's 24 prompts", *SPLIT_COLUMNS)


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    drawn = read_prompts(start.ROOT / start.PROMPTS)
    rows = {"before": {}, "after 400 steps": load_state_dict(train(seed, folder))}
    return {name: (*count_shares(weights, drawn), *measure_split(BASE, weights)) for name, weights in rows.items()}
