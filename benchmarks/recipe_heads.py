"""Write into the head of each recipe what it gives: how often a photo is seen, and the minutes and memory of a run by
GPU, as planned from counts (`benchmarks/plan_models.py`) until somebody measures them."""

import argparse
import re

from benchmarks.plan_models import gpus_of
from library.base.command_parser import make_parser
from library.base.formatting import format_gib
from library.base.terminal import print_line
from library.commands.command import command
from library.memory.planner.gpus import LINUX
from library.memory.planner.known import KnownModel, load_models, plan
from library.training.command_line.recipes import FOLDER, Recipe, list_recipes

EXAMPLES = "  python3 -m benchmarks recipe_heads --write"
NUM_PHOTOS = 30
CARDS = ("8GB", "12GB", "16GB", "24GB")
COUNTED = {
    "anima": "Anima", "chroma": "Chroma", "flux": "FLUX.1", "flux2": "FLUX.2 klein 4B", "flux3": "FLUX.3 Image Klein",
    "hunyuan_image": "HunyuanImage 2.1", "krea2": "Krea 2", "lumina": "Lumina Image 2.0", "moss_image": "MOSS-Image",
    "qwen_image_21": "Qwen-Image 2.1", "sd15": "SD 1.5", "sd3_medium": "SD3 medium", "sdxl": "SDXL",
    "sdxl_anime": "SDXL", "zimage": "Z-Image",
}  # fmt: skip
"""Recipe, without its kind, -> the model that was counted."""
LINES = re.compile(r"(?m)^# (Of 30 photos|Planned).*\n")  # that this command has written


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--write", action="store_true", help="write the recipes; else print what would be written")
    return parser


def list_lines(recipe: Recipe, models: dict[str, KnownModel]) -> list[str]:
    """Return the lines of a recipe's head, without those of GPUs if its model was not counted."""
    batch_size = recipe.values.get("train_batch_size", 1)
    times = recipe.values["max_train_steps"] * batch_size / NUM_PHOTOS
    lines = [f"# Of {NUM_PHOTOS} photos each is seen {times:.0f} times."]
    model = models.get(COUNTED.get(re.sub("_(character|style).*", "", recipe.name), ""))
    if model is None:
        return lines
    cells = []
    for card, gpu in gpus_of(CARDS).items():
        if (chosen := plan(model, gpu, LINUX).chosen) is not None:
            minutes = chosen.seconds * batch_size * recipe.values["max_train_steps"] / 60
            cells.append(f"{card} {minutes:.0f} min ({format_gib(chosen.device_bytes)})")
    side = f"{model.side} px, one image at a time"
    return [*lines, f"# Planned at {side}, not measured: {', '.join(cells)}; {model.title}, without previews."]


def write_head(text: str, lines: list[str]) -> str:
    """Put the lines behind the first one of a recipe, in place of earlier ones."""
    first, _, rest = text.partition("\n")
    return "\n".join([first, *lines, LINES.sub("", rest)])


def write_heads(args: argparse.Namespace) -> None:
    models = {model.title: model for model in load_models()}
    for recipe in list_recipes():
        lines, path = list_lines(recipe, models), FOLDER / f"{recipe.name}.toml"
        print_line("\n".join([recipe.name, *lines]))
        if args.write:
            path.write_text(write_head(path.read_text(encoding="utf-8"), lines), encoding="utf-8", newline="\n")


main = command(setup_parser, write_heads)
