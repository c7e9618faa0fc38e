"""Regularisation images that the base model draws: `prompt` and `num` of a subset."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.description.dataset_file import load_dataset_config
from library.training.offline import contact_sheet
from tests.running import Finished, load_saved, make_images
from tests.tiny.bases import BASES
from tests.unit.data.builders import write_config
from tools import draw

Train = Callable[..., Finished]
PROMPT = "a cat --s 2 --l 3"


def describe(folder: Path, num: int, prompt: str = PROMPT, more: str = "") -> Path:
    """Write a data set of two images and of `num` that are drawn."""
    if not (folder / "photos").exists():
        make_images(folder / "photos", 2)
    path = folder / "data.toml"
    path.write_text(
        f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{folder / "photos"}"\n'
        f'caption_extension = ".txt"\n[[datasets.subsets]]\nis_reg = true\nprompt = "{prompt}"\nnum = {num}\n{more}'
    )
    return path


def arguments(folder: Path, base: list[str], module: str = "networks.lora", name: str = "mine") -> list[str]:
    return [
        *base, "--dataset_config", str(folder / "data.toml"), "--output_dir", str(folder / "out"), "--output_name",
        name, "--network_module", module, "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "3",
        "--seed", "5", "--max_data_loader_n_workers", "0", "--cache_dir", str(folder / "cache"), "--no_report",
        "--mixed_precision", "no",
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["a black cat --s 2", "a --w 64 black --s 2 cat", "--n blue --w 64 a black cat"])
def test_the_caption_is_the_text_of_the_prompt(prompt: str, tmp_path: Path) -> None:
    """Words behind an option's value are text too, and drawn."""
    path = describe(tmp_path, 1, prompt)
    (dataset,) = load_dataset_config(write_config(path, path.read_text())).datasets
    assert [subset.class_tokens for subset in dataset.subsets if subset.is_reg] == ["a black cat"]


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "cache").glob("a_cat-*/*.png"))}


@pytest.mark.parametrize("name", ["sd", pytest.param("flux", marks=pytest.mark.slow)])
def test_the_images_are_drawn_once_and_training_with_kept_ones_is_equal(
    name: str, train: Train, tmp_path: Path
) -> None:
    """They equal those of tools/draw.py."""
    base = BASES[name]
    model = base.build(tmp_path / "model")
    describe(tmp_path, 3)
    first = train(arguments(tmp_path, model, base.module), script=base.script)
    assert first.status == 0, first.stderr
    assert "3 regularisation images are drawn" in first.stderr
    images = drawn(tmp_path)
    assert list(images) == ["00001.png", "00002.png", "00003.png"]
    again = train(arguments(tmp_path, model, base.module, "again"), script=base.script)
    assert again.status == 0 and "are drawn with the base model" not in again.stderr and drawn(tmp_path) == images
    one, two = load_saved(tmp_path), load_saved(tmp_path, "again")
    assert all(torch.equal(one[key], two[key]) for key in one)
    at = model.index("--pretrained_model_name_or_path")
    words = [model[at + 1], *model[:at], *model[at + 2 :], "--mixed_precision", "no", "--output", str(tmp_path / "one")]
    assert draw.main([*words, "--prompt", f"{PROMPT} --w 64 --h 64 --d 2"]) == 0
    (folder,) = (tmp_path / "cache").glob("a_cat-*")
    own, other = (np.asarray(Image.open(path)) for path in (folder / "00002.png", tmp_path / "one/01_2.png"))
    assert (own == other).all()


def test_an_interrupted_drawing_goes_on_and_another_prompt_draws_anew(
    train: Train, tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(tmp_path, ["--pretrained_model_name_or_path", str(tiny_sd_folder)])
    describe(tmp_path, 3)
    whole, count = contact_sheet.draw, 0

    def fail_at_the_third(*values: object) -> Image.Image:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return whole(*values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(contact_sheet, "draw", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            train(words)
    kept = drawn(tmp_path)
    assert list(kept) == ["00001.png", "00002.png"] and not (tmp_path / "out/mine.safetensors").exists()
    describe(tmp_path, 4)
    done = train(words)
    assert done.status == 0 and "2 regularisation images are drawn" in done.stderr
    assert {name: drawn(tmp_path)[name] for name in kept} == kept and len(drawn(tmp_path)) == 4
    describe(tmp_path, 1, "a cat --s 3 --l 3")
    assert train(words).status == 0 and len(list((tmp_path / "cache").glob("a_cat-*"))) == 2


def test_a_look_and_a_dry_run_draw_nothing(train: Train, tiny_sd_folder: Path, tmp_path: Path) -> None:
    describe(tmp_path, 3)
    words = arguments(tmp_path, ["--pretrained_model_name_or_path", str(tiny_sd_folder)])
    for look in ("--audit_only", "--dry_run"):
        done = train([*words, look])
        assert done.status == 0 and "3 images of 'a cat --s 2 --l 3' are left out here" in done.stderr
    assert drawn(tmp_path) == {}


def test_another_file_in_place_of_the_base_draws_anew(train: Train, tmp_path: Path) -> None:
    describe(tmp_path, 1)
    model = BASES["sd"].build(tmp_path / "model")
    assert train(arguments(tmp_path, model)).status == 0
    unet = next(Path(model[1]).glob("unet/*.safetensors")) if Path(model[1]).is_dir() else Path(model[1])
    unet.write_bytes(unet.read_bytes())  # a new time
    assert train(arguments(tmp_path, model, name="b")).status == 0
    assert len(list((tmp_path / "cache").glob("a_cat-*"))) == 2


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('is_reg = true\nprompt = "a cat"', "need prompt, num and is_reg"),
        ('prompt = "a cat"\nnum = 3', "need prompt, num and is_reg"),
        ('is_reg = true\nnum = 3\nimage_dir = "photos"', "need prompt, num and is_reg"),
        ('is_reg = true\nprompt = "a cat"\nnum = 3\nimage_dir = "photos"', "use two subsets"),
        ('is_reg = true\nprompt = "a cat"\nnum = 0', "num"),
        ('is_reg = true\nprompt = "a cat --zz 3"\nnum = 1', "--zz is no option of a prompt"),
    ],
)
def test_what_cannot_be_drawn_is_named_before_anything_is(
    lines: str, expected: str, train: Train, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    path = describe(tmp_path, 1)
    path.write_text(path.read_text().rpartition("is_reg")[0] + lines)
    done = train(arguments(tmp_path, ["--pretrained_model_name_or_path", str(tiny_sd_folder)]))
    assert done.status == 1 and expected in done.stderr and drawn(tmp_path) == {}
