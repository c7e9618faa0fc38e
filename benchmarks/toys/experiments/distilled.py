"""LoRAs of hearts on a guidance-distilled copy of the toy base model (`benchmarks/toys/make_distilled_toy.py`), drawn
as the copy draws: without guidance. 300 steps of the U-Net alone. Preservation is `diff_output_preservation` of 16
circles and 16 triangles, a quarter of the samples of 400 steps, which see as many hearts. The training adapter is a
LoRA of 600 steps with the plain loss on 210 images of the known world. Shares of images that show shape, colour,
background and style of their prompt: of 64 hearts whose combination of words was trained, of 20 new ones, and of 84
prompts of the known world; of those 84 the images that show what the copy draws there, and their mean difference from
what it draws, of the range of a pixel (39 % between different prompts).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.toys.experiments import BASE, SPLIT_COLUMNS, call, measure_split, train
from library.checkpoints.files import load_state_dict
from tools import start
from tools.quickstart.sampling import SAMPLING_STEPS
from tools.quickstart.toy_world import KNOWN_SHAPES

COLUMNS = SPLIT_COLUMNS
TRAINING = "--network_train_unet_only --max_train_steps 300"
KEPT, ADAPTER = (
    "--dataset_config {}/kept.toml --max_train_steps 400",
    "--training_adapter {}/adapter/quickstart.safetensors",
)


@dataclass(frozen=True)
class Row:
    """A copy on which an adapter is drawn, the one on which it is trained with words added to the quickstart's command,
    and the folder of shared files in their place `{}`."""

    drawn_on: str
    trained_on: str | None
    words: str = ""
    num_steps: int = SAMPLING_STEPS


ROWS = {
    "copy for guidance 3": Row("guidance", None),
    "plain": Row("guidance", "guidance"),
    "`--guidance_loss 1.5`": Row("guidance", "guidance", "--guidance_loss 1.5"),
    "`--guidance_loss 3`": Row("guidance", "guidance", "--guidance_loss 3"),
    "`--guidance_loss 4.5`": Row("guidance", "guidance", "--guidance_loss 4.5"),
    "preservation": Row("guidance", "guidance", KEPT),
    "`--guidance_loss 1.5`, preservation": Row("guidance", "guidance", f"--guidance_loss 1.5 {KEPT}"),
    "training adapter": Row("guidance", "guidance", ADAPTER),
    "training adapter, preservation": Row("guidance", "guidance", f"{ADAPTER} {KEPT}"),
    "plain, on the toy base model": Row("guidance", "toy_base"),
}


def run(seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    return run_rows(ROWS, seed, folder)


def run_rows(rows: Mapping[str, Row], seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
    return {name: train_and_measure(name, row, seed, folder) for name, row in rows.items()}


def train_and_measure(name: str, row: Row, seed: int, folder: Path) -> tuple[float, ...]:
    """Train and draw a row; what rows and seeds share is made beside the folder of the seed."""
    shared = folder.parent
    drawn_on = make_copy(shared, row.drawn_on)
    if row.trained_on is None:
        return measure_split(drawn_on, {}, 1.0, row.num_steps)
    if "{}/kept" in row.words:
        make_kept(shared)
    if ADAPTER in row.words:
        make_training_adapter(shared)
    words = ["--pretrained_model_name_or_path", str(make_copy(shared, row.trained_on))]
    words += [word.format(shared) for word in f"{TRAINING} {row.words}".split()]
    file = train(seed, folder / "".join(letter for letter in name if letter.isalnum()), *words)
    return measure_split(drawn_on, load_state_dict(file), 1.0, row.num_steps)


def make_copy(shared: Path, name: str) -> Path:
    if name == BASE.name:
        return BASE
    kind = Path(name).parts[0]
    if not (shared / kind).exists():
        steps = ["--steps", "1000"] if kind == "guidance_input" else []
        call("-m", "benchmarks.toys", "make_distilled_toy", "--kind", kind, "--out", str(shared / kind), *steps)
    return shared / name


def draw_shape(shared: Path, shape: str, count: int) -> Path:
    """Draw images of a known shape, unless they exist."""
    out = shared / f"{shape}_{count}"
    if not out.exists():
        images = ("--shape", shape, "--num_images", str(count), "--out", str(out))
        call("-m", "benchmarks.toys", "make_dataset", *images, "--prompts", str(out.with_suffix(".txt")))
    return out


def write_dataset(file: Path, subsets: Mapping[Path, str]) -> None:
    """Write a dataset of folders, each with more lines of its subset."""
    head = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 8\n'
    parts = (f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(path))}\n{more}\n" for path, more in subsets.items())
    file.write_text(head + "".join(parts), encoding="utf-8")


def make_kept(shared: Path) -> None:
    """Write datasets of hearts with preserved circles and triangles, at all noise levels and at those of 4 steps."""
    kept = [draw_shape(shared, shape, 16) for shape in ("circle", "triangle")]
    hearts = {start.ROOT / "configs/quickstart/dataset": "num_repeats = 3"}
    for name, value in (("kept", "true"), ("kept_4", "{ num_steps = 4 }")):
        more = f"custom_attributes = {{ diff_output_preservation = {value} }}"
        write_dataset(shared / f"{name}.toml", hearts | dict.fromkeys(kept, more))


def make_training_adapter(shared: Path) -> None:
    """Train the adapter that undoes the guidance, unless it exists."""
    if not (shared / "adapter").exists():
        write_dataset(shared / "known.toml", {draw_shape(shared, shape, 42): "" for shape in KNOWN_SHAPES})
        words = ("--dataset_config", str(shared / "known.toml"), "--max_train_steps", "600")
        base = ("--pretrained_model_name_or_path", str(make_copy(shared, "guidance")))
        train(1, shared / "adapter", *base, "--network_train_unet_only", *words)
