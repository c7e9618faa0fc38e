"""--recipe: every recipe is planned and dry-run on a tiny model of its base; explicit options override it."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from library.architectures.scripts import ROOT
from library.training.command_line.recipes import FOLDER, list_recipes
from tests.running import Finished, make_images
from tests.tiny.base import Base
from tests.tiny.bases import BASES
from tools.recipes import main

Train = Callable[..., Finished]
NAMES = [recipe.name for recipe in list_recipes()]


def base_of(name: str) -> Base:
    """Return the base model of a recipe: one script trains relatives, which a setting selects."""
    (recipe,) = (recipe for recipe in list_recipes() if recipe.name == name)
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    bases = [base for base in BASES.values() if f"{base.script}.py" == recipe.script]
    settings = {base.name: base.spec.script_flag.removeprefix("--").partition(" ") for base in bases}
    selected = [b for b in bases if (s := settings[b.name])[0] and f'{s[0]} = "{s[2]}"' in text]
    return (selected or [base for base in bases if not base.spec.script_flag])[0]


QUICK = ("sd15_character", "flux_character")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create pictures/my_cat with captions in the current directory, as a user would."""
    make_images(tmp_path / "pictures" / "my_cat", 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in QUICK else pytest.mark.nightly) for name in NAMES]
)
def test_a_recipe_is_planned_and_dry_run(name: str, train: Train, data: Path) -> None:
    """At 64 px on a simulated GPU no option is ignored, and the largest batch of the dataset is computed."""
    base = base_of(name)
    (recipe,) = (candidate for candidate in list_recipes() if candidate.name == name)
    assert recipe.script == f"{base.script}.py" and recipe.title
    size = ["--fit", "12GB"] if "sd15" not in name else []
    arguments = [
        "128" if word == "32" else word for word in base.build(data / "base")
    ]  # a system prompt takes 78 tokens
    done = train(
        [
            *arguments, "--recipe", name, "--resolution", "64", "--min_bucket_reso", "64",
            "--max_bucket_reso", "128", *size,
            "--mixed_precision", "no", "--output_dir", str(data / "out"), "--output_name", "mine", "--dry_run",
        ],
        base.script,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    log = done.stdout + done.stderr
    assert f"options are read from {FOLDER / name}.toml" in log
    assert "no effect" not in log and "ignored" not in log and "no such option" not in log, log
    assert "dry run: the largest batch has" in log
    assert bool(size) == ("selected: ->" in log)


def test_command_line_and_config_file_override_the_recipe(train: Train, data: Path) -> None:
    make_images(data / "mine" / "2_cat", 2)
    (data / "own.toml").write_text("network_dim = 3\nmax_bucket_reso = 128\nseed = 5\nmax_train_steps = 9\n")
    done = train(
        [
            *BASES["sd"].build(data / "base"), "--recipe", "sd15_style", "--config_file", "own.toml", "--seed", "6",
            "--train_data_dir", "mine", "--resolution", "64", "--mixed_precision", "no", "--sample_prompts", "",
            "--max_train_steps", "2", "--output_dir", "out", "--output_name", "mine", "--min_bucket_reso", "64",
        ]
    )  # fmt: skip
    assert done.status == 0, done.stderr
    with safe_open(data / "out" / "mine.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "3" and metadata["ss_seed"] == "6" and metadata["ss_steps"] == "2"
    assert float(metadata["ss_network_alpha"]) == 16 and metadata["ss_lr_scheduler"] == "cosine"  # from the recipe
    assert metadata["ss_num_train_images"] == "4"  # not the recipe's dataset


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recipe", "sd15_charakter"], "there is no recipe sd15_charakter (did you mean sd15_character?)"),
        (["--recipe", "flux_style"], "--recipe flux_style is for flux_train_network.py"),
    ],
)
def test_an_unknown_recipe_is_rejected(arguments: list[str], error: str, train: Train) -> None:
    done = train(arguments)
    assert done.status == 1 and error in done.stderr


def test_the_tool_lists_and_prints_them() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([]) == 0 and main(["sdxl_style"]) == 0
    text = printed.getvalue()
    assert all(f"--recipe {name} " in text for name in NAMES) and 'script = "sdxl_train_network.py"' in text
    assert main(["sdxl_stile"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_value_has_a_reason(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    for line in re.sub(r"\[steps\].*?(?=\n\[|\Z)", "", text, flags=re.DOTALL).splitlines():
        if " = " in line and not line.startswith(("#", "script", "title")):
            assert "  # " in line, line


def test_every_documented_base_model_has_a_recipe() -> None:
    scripts = {recipe.script for recipe in list_recipes()}
    assert scripts == {path.name for path in ROOT.glob("*train_network.py")}
