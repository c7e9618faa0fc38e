"""Two concepts trained apart with the quickstart's settings and merged: hearts (the quickstart's 32 images) and large
outlined circles (42 images, two of each scene), neither of which the base model draws. The changes are merged as full
matrices, so the rank of the result has no part in the figures. Cells: of 64 images of hearts whose combination of words
was trained, of 20 new ones, of 42 circles and of 42 of the known world, those that show shape, colour, background and
style of their prompt.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.toys.check_adapter import draw_prompts
from benchmarks.toys.experiments import NEW, TRAINED, count_shares, find_hearts, train
from benchmarks.toys.toy_files import save_scene
from networks.core.files.adapter_file import read_adapter_file
from tools import start
from tools.quickstart.sampling import Prompt
from tools.quickstart.toy_world import KNOWN_SHAPES, draw_scene, list_scenes

COLUMNS = ("trained hearts, of 64", "new hearts, of 20", "circles, of 42", "known world, of 42")
CIRCLES = [scene for scene in list_scenes(("circle",), "outlined") if scene.size == "large"]
Merge = Callable[[Tensor, Tensor], Tensor]


METHODS: Mapping[str, Merge] = {
    "hearts alone": lambda first, second: first,
    "circles alone": lambda first, second: second,
    "`sum`": lambda first, second: first + second,
    "`sum`, ratios 0.5 0.5": lambda first, second: 0.5 * (first + second),
    "`sum`, ratios 1 0.5": lambda first, second: first + 0.5 * second,
    "`sum`, ratios 0.5 0.7": lambda first, second: 0.5 * first + 0.7 * second,
}


def train_circles(seed: int, folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for number, scene in enumerate(2 * CIRCLES):
        path = folder / "circles" / f"{number:02}.png"
        save_scene(path, Image.fromarray(draw_scene(scene, rng)), __file__, scene.caption())
    dataset = (start.ROOT / "configs/quickstart/dataset.toml").read_text(encoding="utf-8")
    dataset = dataset.replace('"configs/quickstart/dataset"', json.dumps(str(folder / "circles")))
    (folder / "circles.toml").write_text(dataset, encoding="utf-8")
    return train(seed, folder, "--dataset_config", str(folder / "circles.toml"))


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    paths = find_hearts(folder), train_circles(seed, folder)
    files = [read_adapter_file(path, "--models").modules for path in paths]
    circles = [Prompt(scene.caption(), 1000 + number) for number, scene in enumerate(2 * CIRCLES)]
    parts = TRAINED, NEW, circles, draw_prompts(KNOWN_SHAPES, 42)
    rows = {}
    for name, merge in METHODS.items():
        weights = {}
        for module in files[0]:
            first, second = (file[module].weight(torch.float64) for file in files)
            weights[f"{module}.diff"] = merge(first.flatten(1), second.flatten(1)).reshape(first.shape).float()
        rows[name] = count_shares(weights, *parts)
    return rows
