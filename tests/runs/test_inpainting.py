"""--train_inpainting with the training scripts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.running import Finished, load_saved
from tests.tiny.inpainting import widen_file, widen_folder

Train = Callable[..., Finished]


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
    uninterrupted = train([*inpainting, *masked, "--max_train_steps", "4", "--output_name", "whole"])
    assert uninterrupted.status == 0, uninterrupted.stderr
    half = ["--save_every_n_steps", "2", "--save_state", "--max_train_steps", "4", "--output_name", "half"]
    assert train([*inpainting, *masked, *half]).status == 0
    state = str(tmp_path / "out" / "half-step00000002-state")
    done = train([*inpainting, *masked, "--max_train_steps", "4", "--resume", state, "--output_name", "again"])
    assert done.status == 0, done.stderr
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
    done = train([*words, "--output_name", "saving", "--gradient_checkpointing", "--vae_batch_size", "2"])
    assert done.status == 0, done.stderr
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
    done = train([*inpainting, "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"])
    assert done.status == 0, done.stderr
    previews = sorted((tmp_path / "out" / "sample").glob("*.png"))
    first, second = (np.asarray(Image.open(path)).astype(int) for path in previews)
    assert first.shape == (64, 64, 3) and np.abs(first - second).max() > 0


def test_sdxl_inpainting_trains_from_a_single_file(
    train: Train, tiny_sdxl_file: Path, images: Path, tmp_path: Path, base_arguments: list[str]
) -> None:
    base = widen_file(tiny_sdxl_file, tmp_path / "inpainting", seed=53)
    done = train(with_base_model(base_arguments, base), script="sdxl_train_network")
    assert done.status == 0, done.stderr
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
