"""The quickstart's training, on 32 images of hearts. Each cell is the share of images that show shape, colour,
background and style of their prompt: the quickstart's 24 prompts, and 32 of the known world.
"""

from pathlib import Path

from benchmarks.toys.check_adapter import draw_prompts
from library.checkpoints.files import load_state_dict
from tests.runs.docs_pages import run_commands
from tools import start
from tools.quickstart.sampling import count_right, load_pipeline, merge_lora, read_prompts, sample
from tools.quickstart.toy_world import KNOWN_SHAPES

COLUMNS = ("before", "after")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    run_commands(start.ROOT / "docs" / "train_network.md", r"train\.toml --seed \d+$", folder, ["--seed", str(seed)])
    prompts = {"hearts": read_prompts(start.ROOT / start.PROMPTS), "known world": draw_prompts(KNOWN_SHAPES, 32)}
    pipeline = load_pipeline(start.ROOT / start.TOY_BASE)
    shares = []
    for weights in ({}, load_state_dict(folder / start.ADAPTER)):
        if weights:
            merge_lora(pipeline, weights)
        shares.append({name: count_right(sample(pipeline, p), p) / len(p) for name, p in prompts.items()})
    return {name: tuple(of_adapter[name] for of_adapter in shares) for name in prompts}
