"""List the recipes of configs/recipes for --recipe, or print one: the options of a typical training run, each with
its reason."""

import argparse
import sys
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise
from math import log
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.base.command_parser import make_parser
from library.base.errors import UserError, error_in
from library.base.suggestions import did_you_mean
from library.base.terminal import print_line
from library.commands.command import command
from library.training.command_line.recipes import FOLDER, Recipe, list_recipes

EXAMPLES = """\
  python3 tools/recipes.py
  python3 tools/recipes.py NAME"""


MOST_STEPS = 10_000  # of a run whose length nobody gave


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("name", nargs="?", help="print this recipe; unset: list all")
    return parser


def interpolate_steps(steps: Mapping[int, int], num_images: int) -> int:
    """Return the steps for a number of images: a line through the table's logarithms, in tens.

    With fewer images than in its first row, each is seen as often as there; beyond the last row the line goes on, up to
    MOST_STEPS.
    """
    images = sorted(steps)
    if num_images < images[0]:
        tens = steps[images[0]] * num_images / images[0] / 10
    else:
        end = min(max(bisect_left(images, num_images), 1), len(images) - 1)
        low, high = images[end - 1], images[end]
        power = log(steps[high] / steps[low]) / log(high / low)
        tens = steps[low] * (num_images / low) ** power / 10
    return min(MOST_STEPS, 10 * max(1, round(tens)))


def check_steps(recipe: Recipe) -> None:
    """Raise UserError unless the steps grow with the images, and those of 30 are the recipe's own."""
    rows, length = sorted(recipe.steps.items()), recipe.values["max_train_steps"]
    grows = all(images > 0 and 0 < fewer <= more for (images, fewer), (_, more) in pairwise(rows))
    if len(rows) < 2 or not grows or recipe.steps.get(30) != length:
        raise UserError(
            f"{recipe.name}: [steps] is {recipe.steps}",
            f"list at least two numbers of images, of which 30 has the {length} of max_train_steps, and more images "
            "no fewer steps",
        )


def show_recipes(args: argparse.Namespace) -> None:
    """Print the list, or one recipe. Raises UserError for an unknown name, or a wrong table of steps."""
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    for recipe in recipes.values():
        check_steps(recipe)
    if args.name is None:
        for recipe in recipes.values():
            print_line(f"{recipe.script:32} --recipe {recipe.name:24} {recipe.title}")
    elif args.name in recipes:
        print_line((FOLDER / f"{args.name}.toml").read_text(encoding="utf-8"), end="")
    else:
        raise error_in("name")(
            f"there is no recipe {args.name}{did_you_mean(args.name, recipes)}", "run without a name to list all"
        )


main = command(setup_parser, show_recipes)

if __name__ == "__main__":
    sys.exit(main())
