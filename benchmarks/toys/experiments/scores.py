"""Does a score that needs no model tell which checkpoint draws what is asked? The rank correlation (Spearman) of each
score with the share of images that the checker counts as right, over the ten checkpoints of a quickstart run, every
40 steps, and the share at the checkpoint with the highest score. Each checkpoint draws 72 images: the 24 prompts of
configs/quickstart/prompts.txt with three seeds. Stillness is how little they change from the checkpoint before. A
correlation of 1 is 100 %. "Right" is the checker itself."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from benchmarks.toys.check_adapter import draw_images
from benchmarks.toys.experiments import BASE, train
from library.checkpoints.files import load_state_dict
from library.training.evaluation.image_scores import NEAR_COPIES, SHARPNESS, build_scorer, measure_change
from library.training.evaluation.strength_response import rank_correlation
from tools.quickstart.sampling import count_right, read_prompts
from tools.quickstart.toy_world import QUICKSTART

COLUMNS = ("rank correlation with right", "right at the highest")
CHANGE = "stillness"  # how little the images change from the checkpoint before, whose sign makes higher better
EVERY, STEPS, NUM_SEEDS = 40, 400, 3


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    """Train with `seed` into `folder`, and score each checkpoint."""
    train(seed, folder, "--save_every_n_steps", str(EVERY))
    scorer = build_scorer(Image.open(path).convert("RGB") for path in sorted((QUICKSTART / "dataset").glob("*.png")))
    prompts = [
        replace(prompt, seed=100 * number + prompt.seed)
        for number in range(NUM_SEEDS)
        for prompt in read_prompts(QUICKSTART / "prompts.txt")
    ]
    figures: dict[str, list[float]] = {"right": [], SHARPNESS: [], NEAR_COPIES: [], CHANGE: []}
    before: list[Image.Image] | None = None
    for step in range(EVERY, STEPS + 1, EVERY):
        ending = f"-step{step:08d}" if step < STEPS else ""
        (images,) = draw_images(BASE, load_state_dict(folder / f"quickstart{ending}.safetensors"), [prompts])
        drawn = [Image.fromarray(image) for image in images]
        scores = scorer.score(drawn, [])
        scores[CHANGE] = [-measure_change(before or drawn, drawn)] if before else [-1.0]  # the first counts as moving
        before = drawn
        figures["right"].append(count_right(images, prompts) / len(images))
        for name, values in scores.items():
            figures[name].append(mean(values))
    right = figures["right"]
    return {name: (rank_correlation(values, right), right[int(np.argmax(values))]) for name, values in figures.items()}
