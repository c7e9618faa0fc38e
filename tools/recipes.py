"""List the recipes of configs/recipes for --recipe, or print one: the options of a typical training run, each with
its reason."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import UserError
from library.suggestions import did_you_mean
from library.training.command_line.recipes import FOLDER, list_recipes
from tools.command import command, make_parser

EXAMPLES = """\
  python3 tools/recipes.py
  python3 tools/recipes.py NAME"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("name", nargs="?", help="print this recipe; unset: list all")
    return parser


def show_recipes(args: argparse.Namespace) -> None:
    """Print the list, or one recipe. Raises UserError for an unknown name."""
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if args.name is None:
        for recipe in recipes.values():
            print(f"{recipe.script:32} --recipe {recipe.name:24} {recipe.title}")
    elif args.name in recipes:
        print((FOLDER / f"{args.name}.toml").read_text(encoding="utf-8"), end="")
    else:
        raise UserError(
            f"there is no recipe {args.name}{did_you_mean(args.name, recipes)}; run without a name to list all"
        )


main = command(setup_parser, show_recipes)

if __name__ == "__main__":
    sys.exit(main())
