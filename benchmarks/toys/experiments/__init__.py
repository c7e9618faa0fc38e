"""Comparisons on the toy world: one module for each table of `benchmarks/toys/evidence.py`, and what they share."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.toys.check_adapter import draw_images, draw_prompts
from library.base.errors import UserError
from library.environment.running import child_environment
from tools import start
from tools.quickstart.sampling import GUIDANCE_SCALE, SAMPLING_STEPS, Prompt, count_right
from tools.quickstart.toy_world import KNOWN_SHAPES, QUICKSTART, ImageArray, look_at

CONFIG = "configs/quickstart/train.toml"
BASE = start.ROOT / start.TOY_BASE
HEARTS = draw_prompts(("heart",), 84)
WIDE_WORLD = draw_prompts(KNOWN_SHAPES, 84)
CAPTIONS = {file.read_text(encoding="utf-8").strip() for file in (QUICKSTART / "dataset").glob("*.txt")}
TRAINED = [prompt for prompt in HEARTS if prompt.caption in CAPTIONS]
NEW = [prompt for prompt in HEARTS if prompt.caption not in CAPTIONS]
SPLIT_COLUMNS = (
    f"trained hearts, of {len(TRAINED)}",
    f"new hearts, of {len(NEW)}",
    f"known world, of {len(WIDE_WORLD)}",
    f"like the base model, of {len(WIDE_WORLD)}",
    "pixels differ",
)


def call(*words: str) -> None:
    """Run a script of this repository; only its errors and progress are shown."""
    environment = child_environment()
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


def find_hearts(folder: Path) -> Path:
    """Return the quickstart's adapter of the seed whose folder of another experiment this is."""
    hearts = folder.parents[1] / "quickstart" / folder.name / Path(start.ADAPTER).name
    if not hearts.is_file():
        raise UserError(f"{hearts} does not exist; name quickstart before {folder.parent.name}, which reads it")
    return hearts


def measure_split(
    base: Path, weights: dict[str, Tensor], guidance: float = GUIDANCE_SCALE, num_steps: int = SAMPLING_STEPS
) -> tuple[float, ...]:
    """Return the shares of hearts of trained combinations of words, of new ones, and of 84 images of the known world
    that are as asked; of those 84 the share that shows what the base model draws there, and their mean difference from
    its images, of the range of a pixel."""
    parts = (TRAINED, NEW, WIDE_WORLD)
    drawn = draw_images(base, weights, parts, guidance=guidance, num_steps=num_steps)
    shares = [count_right(images, prompts) / len(prompts) for images, prompts in zip(drawn, parts, strict=True)]
    expected = draw_wide_world(base, guidance, num_steps)
    difference = np.abs(np.stack(drawn[-1]).astype(float) - np.stack(expected)).mean() / 255
    return (*shares, sum(map(show_the_same, drawn[-1], expected)) / len(expected), float(difference))


@cache
def draw_wide_world(base: Path, guidance: float, num_steps: int) -> list[ImageArray]:
    """Draw what a base model shows of the known world; an experiment asks for it in each of its rows."""
    return draw_images(base, {}, [WIDE_WORLD], guidance=guidance, num_steps=num_steps)[0]


def show_the_same(image: ImageArray, other: ImageArray) -> bool:
    seen, wanted = look_at(image), look_at(other)
    return (seen.shape, seen.colour, seen.background) == (wanted.shape, wanted.colour, wanted.background)
