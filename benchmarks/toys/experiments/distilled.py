"""A LoRA of hearts on a guidance-distilled copy of the toy base model (`benchmarks/toys/make_distilled_toy.py`), drawn
without guidance: 300 steps of the U-Net alone with the plain loss, and with `--guidance_loss`. Shares of images that
show shape, colour, background and style of their prompt: of 64 hearts whose combination of words was trained, of 20 new
ones, and of 84 prompts of the known world; last, of those 84 the images that show what the base model draws there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.toys.experiments import SPLIT_COLUMNS, call, measure_split, train
from library.checkpoints.files import load_state_dict

COLUMNS = SPLIT_COLUMNS
LOSSES: Mapping[str, Sequence[str]] = {
    "plain": (),
    **{f"`--guidance_loss {scale}`": ("--guidance_loss", scale) for scale in ("1.5", "3")},
}
TRAINING = ("--network_train_unet_only", "--max_train_steps", "300")


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    base = make_base(folder.parent / "base")
    return {
        "base model": measure_split(base, {}, 1.0),
        **{row: train_and_measure(base, row, seed, folder) for row in LOSSES},
    }


def make_base(base: Path) -> Path:
    if not base.exists():
        call("-m", "benchmarks.toys", "make_distilled_toy", "--kind", "guidance", "--out", str(base))
    return base


def train_and_measure(base: Path, row: str, seed: int, folder: Path) -> tuple[float, ...]:
    """Train with the loss of a row."""
    words = ("--pretrained_model_name_or_path", str(base), *TRAINING, *LOSSES[row])
    file = train(seed, folder / "".join(letter for letter in row if letter.isalnum()), *words)
    return measure_split(base, load_state_dict(file), 1.0)
