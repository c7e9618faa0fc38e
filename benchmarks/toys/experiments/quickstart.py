"""The quickstart's training, on 32 images of hearts. Each cell is the share of images that show shape, colour,
background and style of their prompt: the quickstart's 24 prompts, and 32 of the known world.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import draw_prompts
from benchmarks.toys.experiments import count_shares, train
from library.checkpoints.files import load_state_dict
from tools import start
from tools.quickstart.sampling import read_prompts
from tools.quickstart.toy_world import KNOWN_SHAPES

COLUMNS = ("before", "after")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    prompts = {"hearts": read_prompts(start.ROOT / start.PROMPTS), "known world": draw_prompts(KNOWN_SHAPES, 32)}
    trained = load_state_dict(train(seed, folder))
    before, after = (count_shares(weights, *prompts.values()) for weights in ({}, trained))
    return dict(zip(prompts, zip(before, after, strict=True), strict=True))
