"""Adapter kinds that learn hearts, which the base model has never seen: the quickstart's training (400 steps, AdamW, a
learning rate of 1e-3 with a cosine) with words added; columns as in the quickstart's own table.
"""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.toys.experiments import BASE, SPLIT_COLUMNS, find_hearts, measure_split, train
from library.checkpoints.files import load_state_dict

COLUMNS = SPLIT_COLUMNS
KINDS: Mapping[str, str] = {
    "DoRA": "--network_args conv_dim=16 conv_alpha=16 dora_wd=True",
    "LoKr": "--network_module networks.lokr --network_dim 16 --network_alpha 16"
    " --network_args factor=4 conv_dim=16 conv_alpha=16 --learning_rate 2e-3 --max_train_steps 700",
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    files = {"LoRA with convolutions, the quickstart itself": find_hearts(folder)}
    for kind, words in KINDS.items():
        files[f"{kind}: `{words}`"] = train(seed, folder / kind, *words.split())
    return {row: measure_split(BASE, load_state_dict(file)) for row, file in files.items()}
