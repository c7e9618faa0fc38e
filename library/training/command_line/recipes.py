"""--recipe: options for common trainings, from configs/recipes."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.base.errors import about, error_in
from library.base.suggestions import did_you_mean
from library.options.config_file import read_toml
from library.training.config_file import Config, flatten, read_values

FOLDER = Path(__file__).parents[3] / "configs" / "recipes"
PATHS = ("dataset_config", "sample_prompts")  # relative to the recipes' folder, not to the current one
IMAGES = ("train_data_dir", "in_json", "dataset_class")  # these replace a dataset file
IMAGES_FILE = "images.toml"  # the dataset file of all recipes
HEAD = "recipe"  # the table that describes the recipe
STEPS = "steps"  # the table of steps by number of images, which train.py reads


@dataclass(frozen=True)
class Recipe:
    """The description of a recipe: its name, its script and a title for lists."""

    name: str  # "knots_character"
    script: str  # "knots_train_network.py"
    title: str
    values: Mapping[str, Any]  # the options as in its file; paths are relative to the recipes' folder
    words: tuple[str, ...] = ()  # the base's name has one of them; empty: any name
    has: str = ""  # pattern of a tensor name of the base
    steps: Mapping[int, int] = field(default_factory=dict)  # number of images -> steps


def list_recipes() -> list[Recipe]:
    """List all recipes by name. Raises UserError for a damaged file."""
    return [read_head(path) for path in sorted(FOLDER.glob("*.toml")) if path.name != IMAGES_FILE]


def read_head(path: Path) -> Recipe:
    tables = dict(read_toml(path, "--recipe"))
    head, steps = tables.pop(HEAD), {int(images): number for images, number in tables.pop(STEPS).items()}
    values, words = flatten(tables, path, []), tuple(head.get("words", ()))
    return Recipe(path.stem, head["script"], head["title"], values, words, head.get("has", ""), steps)


def read_recipe(
    name: str,
    script: str,
    requested: Mapping[str, Any],
    actions: Mapping[str, argparse.Action],
    elsewhere: Callable[[str], str],
) -> Config:
    """Return a recipe's options like those of a config file; images that `requested` names replace its dataset.

    Raises UserError for an unknown name, or for another script's recipe.
    """
    names = [recipe.name for recipe in list_recipes()]
    if name not in names:
        raise error_in("--recipe")(
            f"there is no recipe {name}{did_you_mean(name, names)}; `python3 tools/recipes.py` lists them"
        )
    path = FOLDER / f"{name}.toml"
    recipe = read_head(path)
    if recipe.script != script:
        raise about("--recipe")(f"{recipe.name} is for {recipe.script}; `python3 tools/recipes.py` lists others")
    warnings: list[str] = []
    values = read_values(recipe.values, str(path), actions, warnings, elsewhere)
    if any(requested.get(option) for option in IMAGES):
        values.pop("dataset_config", None)
    for option in values.keys() & set(PATHS):
        values[option] = type(values[option])(FOLDER / values[option])
    return Config(path, values, warnings)
