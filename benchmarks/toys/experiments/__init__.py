"""Comparisons on the toy world: one module for each table of `benchmarks/toys/evidence.py`, and what they share."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from benchmarks.toys.check_adapter import draw_images, draw_prompts
from library.checkpoints.files import load_state_dict
from tools import start
from tools.quickstart.sampling import Prompt, count_right
from tools.quickstart.toy_world import KNOWN_SHAPES

CONFIG = "configs/quickstart/train.toml"
BASE = start.ROOT / start.TOY_BASE
HEARTS, KNOWN_WORLD = draw_prompts(("heart",), 84), draw_prompts(KNOWN_SHAPES, 21)


def call(*words: str) -> None:
    """Run a script of this repository; only its errors and progress are shown."""
    environment = start.child_environment()
    subprocess.run([sys.executable, *words], cwd=start.ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)


def train(seed: int, folder: Path, *words: str) -> Path:
    """Run the quickstart's training with words added. Return its file."""
    output = ["--seed", str(seed), "--output_dir", str(folder), "--no_report"]
    call("train_network.py", "--config_file", CONFIG, *output, *words)
    return folder / Path(start.ADAPTER).name


def count_shares(weights: dict[str, Tensor], *parts: Sequence[Prompt]) -> tuple[float, ...]:
    """Return the share of each part's images that show shape, colour, background and style of their prompt, with an
    adapter's weights unless they are empty."""
    of_parts = zip(draw_images(BASE, weights, parts), parts, strict=True)
    return tuple(count_right(images, prompts) / len(prompts) for images, prompts in of_parts)


def measure(file: Path) -> tuple[float, ...]:
    """Return the shares of 84 hearts and of 21 images of the known world."""
    return count_shares(load_state_dict(file), HEARTS, KNOWN_WORLD)
