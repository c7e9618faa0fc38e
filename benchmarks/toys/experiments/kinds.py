"""Adapter kinds that learn hearts, which the base model has never seen: the quickstart's training (400 steps, AdamW, a
learning rate of 1e-3 with a cosine) with words added. Each cell is the share of images that show shape, colour,
background and style of their prompt: 84 hearts, and 21 of the known world.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.toys.experiments import measure, train

COLUMNS = ("hearts", "known world")
KINDS: Mapping[str, str] = {
    "LoRA with convolutions, the quickstart itself": "",
    "DoRA": "--network_args conv_dim=16 conv_alpha=16 dora_wd=True",
    "LoKr": "--network_module networks.lokr --network_dim 16 --network_alpha 16"
    " --network_args factor=4 conv_dim=16 conv_alpha=16 --learning_rate 2e-3 --max_train_steps 700",
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    rows = {}
    for number, (kind, words) in enumerate(KINDS.items()):
        file = train(seed, folder / str(number), *words.split())
        rows[f"{kind}: `{words}`" if words else kind] = measure(file)
    return rows
