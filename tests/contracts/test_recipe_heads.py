"""The heads of the recipes say what `benchmarks/recipe_heads.py --write` writes."""

from benchmarks.recipe_heads import list_lines, write_head
from library.memory.planner.known import load_models
from library.training.command_line.recipes import FOLDER, list_recipes


def test_the_heads_are_up_to_date() -> None:
    models = {model.title: model for model in load_models()}
    for recipe in list_recipes():
        text = (FOLDER / f"{recipe.name}.toml").read_text(encoding="utf-8")
        assert write_head(text, list_lines(recipe, models)) == text, recipe.name


def test_heads_without_a_counted_model_say_how_often_a_photo_is_seen() -> None:
    heads = {recipe.name: list_lines(recipe, {}) for recipe in list_recipes()}
    assert heads["toy_character"] == ["# Of 30 photos each is seen 107 times."]
    assert all(len(lines) == 1 for lines in heads.values())
