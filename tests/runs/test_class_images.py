"""Drawn regularisation images, padded captions, and --train_inpainting with the training scripts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.files import load_state_dict
from library.data.caching import text_files
from library.data.description.dataset_file import load_dataset_config
from library.training.offline import contact_sheet
from tests.running import Finished, load_saved, make_images, small_run
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES
from tests.tiny.inpainting import widen_file, widen_folder
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
    first = train(arguments(tmp_path, model, base.module), script=base.script).ok()
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


# Batches of captions of different lengths, whose tokens are padded to a multiple of a fixed number.


@pytest.mark.parametrize("name", first_is_fast(["krea2", *(n for n in BASES if n != "krea2" and BASES[n].caches_text)]))
def test_padding_to_a_multiple_changes_no_result(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, images = BASES[name], tmp_path / "data"
    make_images(images / "1_thing", 4, seed=3)
    for number, path in enumerate(sorted((images / "1_thing").glob("*.png"))):
        path.with_suffix(".txt").write_text("a red cat " * (1 + number))
    model = base.build(tmp_path / "model")
    for step in (1, text_files.TOKEN_STEP):
        monkeypatch.setattr(text_files, "TOKEN_STEP", step)
        words = [*model, *small_run(images, tmp_path, base.module, "2"), "--output_name", f"of_{step}"]
        done = train([*words, "--mixed_precision", "no", "--optimizer_type", "SGD"], script=base.script).ok()
        shows_two = "inputs had 2 shapes in an epoch" in done.stderr
        assert shows_two == (step == 1) or (name != "krea2" and not shows_two), done.stderr
    files = [load_state_dict(tmp_path / "out" / f"of_{step}.safetensors") for step in (1, 64)]
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, rtol=1e-5, atol=1e-6)
    assert any(tensor.any() for key, tensor in files[0].items() if "lora_up" in key or "lora_B" in key)


# --train_inpainting with the training scripts.


def with_base_model(arguments: list[str], base: Path) -> list[str]:
    """Return the arguments with another base model."""
    place = arguments.index("--pretrained_model_name_or_path") + 1
    return [*arguments[:place], str(base), *arguments[place + 1 :], "--train_inpainting"]


@pytest.fixture
def inpainting(base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path) -> list[str]:
    return with_base_model(base_arguments, widen_folder(tiny_sd_folder, tmp_path / "inpainting", seed=51))


def test_training_uses_masks_and_a_resumed_run_equals_the_uninterrupted_one(
    train: Train, inpainting: list[str], tmp_path: Path
) -> None:
    """Validation losses agree too at each step with equal weights."""
    masked = ["--validation_split", "0.34", "--validate_every_n_steps", "2"]
    uninterrupted = train([*inpainting, *masked, "--max_train_steps", "4", "--output_name", "whole"]).ok()
    half = ["--save_every_n_steps", "2", "--save_state", "--max_train_steps", "4", "--output_name", "half"]
    assert train([*inpainting, *masked, *half]).status == 0
    state = str(tmp_path / "out" / "half-step00000002-state")
    done = train([*inpainting, *masked, "--max_train_steps", "4", "--resume", state, "--output_name", "again"]).ok()
    expected, other = load_saved(tmp_path, "whole"), load_saved(tmp_path, "again")
    assert all(torch.equal(weight, other[name]) for name, weight in expected.items())
    (line,) = {line for line in uninterrupted.stderr.splitlines() if "validation after step 4:" in line}
    loss = line.split("loss ")[1].split(" on")[0]
    assert f"validation after step 4: loss {loss} on" in done.stderr


def test_gradient_checkpointing_and_vae_batch_size_do_not_change_the_adapter(
    train: Train, inpainting: list[str], tmp_path: Path
) -> None:
    # Adam would amplify gradients that are nearly zero, of which only rounding errors remain.
    words = [*inpainting, "--optimizer_type", "SGD", "--learning_rate", "0.5"]
    train([*words, "--output_name", "plain"])
    train([*words, "--output_name", "saving", "--gradient_checkpointing", "--vae_batch_size", "2"]).ok()
    plain, saving = load_saved(tmp_path, "plain"), load_saved(tmp_path, "saving")
    assert max(weight.abs().max() for name, weight in plain.items() if "lora_up" in name) > 1e-3
    for name, weight in plain.items():
        torch.testing.assert_close(weight, saving[name], rtol=1e-3, atol=1e-6)


def test_previews_inpaint_the_image_named_in_the_prompt(train: Train, inpainting: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(52)
    rgba = rng.integers(0, 256, (80, 64, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[20:50, 10:40, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "shown.png")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "opaque.png")
    lines = [f"a cat --w 64 --h 64 --s 2 --d 4 --i {tmp_path / name}" for name in ("shown.png", "opaque.png")]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    train([*inpainting, "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"]).ok()
    previews = sorted((tmp_path / "out" / "sample").glob("*.png"))
    first, second = (np.asarray(Image.open(path)).astype(int) for path in previews)
    assert first.shape == (64, 64, 3) and np.abs(first - second).max() > 0


def test_sdxl_inpainting_trains_from_a_single_file(
    train: Train, tiny_sdxl_file: Path, images: Path, tmp_path: Path, base_arguments: list[str]
) -> None:
    base = widen_file(tiny_sdxl_file, tmp_path / "inpainting", seed=53)
    train(with_base_model(base_arguments, base), script="sdxl_train_network").ok()
    assert all(w.isfinite().all() for w in load_saved(tmp_path, "mine").values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cache_latents"], r"--train_inpainting does not work with --cache_latents: "),
        (["--cache_latents_to_disk"], r"does not work with --cache_latents_to_disk: "),
        (["--sample_prompts", "{here}/nothing.txt", "--sample_at_first"], "has no image to inpaint"),
        (["--sample_prompts", "{here}/lost.txt", "--sample_at_first"], "there is no such file"),
    ],
)
def test_invalid_options_are_reported_before_a_model_is_loaded(
    train: Train, inpainting: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    import re

    (tmp_path / "nothing.txt").write_text("a cat --w 64 --h 64")
    (tmp_path / "lost.txt").write_text("a cat --w 64 --h 64 --i lost.png")
    done = train([*inpainting, *(word.replace("{here}", str(tmp_path)) for word in more)])
    assert done.status != 0 and re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_dataset_class_without_images_is_refused(
    train: Train, inpainting: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masked part of an image is cut out of its pixels, which latents do not have."""
    (tmp_path / "my_latents.py").write_text(
        "import torch\n\n"
        "class Latents:\n"
        "    def __init__(self, *arguments): pass\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return {'captions': ['a cat'], 'latents': torch.zeros(1, 4, 8, 8)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = train([*inpainting, "--dataset_class", "my_latents.Latents"])
    assert done.status == 1 and "--train_inpainting needs images, but --dataset_class" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_inpainting_model_needs_the_option(train: Train, inpainting: list[str]) -> None:
    done = train(inpainting[:-1])
    assert done.status != 0 and "is an inpainting model" in done.stderr and "add --train_inpainting" in done.stderr
