"""qwen_image_21_train_network.py on a tiny model: musubi-tuner's commands, pairs, and alpha channels."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.running import Finished, load_saved, make_images
from tests.tiny.qwen_image_21 import build_tiny_qwen_image_21
from tools import choose_checkpoint

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_qwen_image_21(tmp_path_factory.mktemp("tiny_qwen_image_21"), seed=31)


@pytest.fixture
def train_qwen(train: Train) -> Train:
    return partial(train, script="qwen_image_21_train_network")


def settings(config: Path, tmp_path: Path) -> list[str]:
    """Return arguments for four training steps, without those of the base model."""
    return [
        "--dataset_config", str(config), "--output_dir", str(tmp_path / "out"), "--output_name", "mine",
        "--network_module", "networks.lora_qwen_image_21", "--network_dim", "4", "--learning_rate", "1e-3",
        "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[key]) for key, weight in a.items())


def pairs(tmp_path: Path) -> Path:
    """Write four images with two references each; one image and one reference are partly transparent."""
    make_images(tmp_path / "after", 4)
    for number, side in enumerate((96, 64)):
        make_images(tmp_path / f"before{number}", 4, side=side, seed=1 + number)
    for path in (tmp_path / "after" / "00.png", tmp_path / "before1" / "01.png"):
        make_half_transparent(path)
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
[[datasets]]
resolution = 64
batch_size = 2
caption_extension = ".txt"

[[datasets.subsets]]
image_dir = "{(tmp_path / "after").as_posix()}"
control_dirs = ["{(tmp_path / "before0").as_posix()}", "{(tmp_path / "before1").as_posix()}"]
control_no_resize = true
flip_aug = true
caption_dropout_rate = 0.3
"""
    )
    return config


def make_half_transparent(path: Path) -> None:
    """Make the left half of an image transparent."""
    with Image.open(path) as image:
        alpha = np.full((image.height, image.width), 255, dtype=np.uint8)
        alpha[:, : image.width // 2] = 0
        image.putalpha(Image.fromarray(alpha))
        image.save(path)


def test_training_on_pairs_resumes_exactly_and_previews_show_the_references(
    train_qwen: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    shown = " ".join(f"--ci {(tmp_path / f'before{number}' / '01.png').as_posix()}" for number in (0, 1))
    (tmp_path / "prompts.txt").write_text(f"make it red --w 64 --h 64 --s 2 --d 3 {shown}\nred --w 64 --h 64 --s 2\n")
    config = pairs(tmp_path)
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]
    uninterrupted = [
        *tiny_arguments, *settings(config, tmp_path), *caches, "--save_every_n_steps", "2", "--save_state",
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4", "--guidance_loss", "2",
    ]  # fmt: skip
    done = train_qwen(uninterrupted)
    assert done.status == 0, done.stderr
    assert "2 reference images for each image" in done.stderr and "failed" not in done.stderr
    assert "alpha channel" not in done.stderr  # the alpha channel is not dropped
    state = str(tmp_path / "out" / "mine-step00000002-state")
    done = train_qwen([*uninterrupted, "--output_name", "resumed", "--resume", state])
    assert done.status == 0, done.stderr
    assert are_equal(load_saved(tmp_path), load_saved(tmp_path, "resumed"))
    sizes = []
    for path in sorted((tmp_path / "out" / "sample").glob("mine*.png")):
        with Image.open(path) as image:
            sizes.append((image.mode, image.width > 3 * 64))
    assert sizes == [("RGBA", True), ("RGBA", False)]

    # Its caption must be encoded again: plain, mirrored and empty.
    make_half_transparent(tmp_path / "before0" / "02.png")
    done = train_qwen([*uninterrupted, "--output_name", "changed"])
    assert done.status == 0, done.stderr
    assert "text cache: 4 files reused, 0 to encode, 1 stale (1 made for other captions" in done.stderr
    assert "latent cache: 3 entries reused, 0 to encode, 1 stale" in done.stderr
    assert not are_equal(load_saved(tmp_path), load_saved(tmp_path, "changed"))


def test_files_are_compared_on_trained_pairs_and_their_mirror_images(
    train_qwen: Train, tiny_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The text encoder sees the mirrored references too."""
    config = pairs(tmp_path)
    config.write_text(config.read_text().replace("flip_aug = true", ""))
    words = [*tiny_arguments, *settings(config, tmp_path), "--cache_text_encoder_outputs", "--network_train_unet_only"]
    done = train_qwen([*words, "--max_train_steps", "1"])
    assert done.status == 0, done.stderr
    assert choose_checkpoint.main(["--script", "qwen_image_21_train_network.py", *words]) == 0
    assert "memorization gap" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("extra", "keys", "message"),
    [
        ([], "", "its outputs must be cached; add --cache_text_encoder_outputs"),
        (["--cache_text_encoder_outputs"], "color_aug = true", "color_aug changes reference images in every draw"),
    ],
    ids=["not cached", "changed in every draw"],
)
def test_pairs_with_uncacheable_features_are_rejected(
    train_qwen: Train, tiny_arguments: list[str], tmp_path: Path, extra: list[str], keys: str, message: str
) -> None:
    config = pairs(tmp_path)
    config.write_text(config.read_text().replace("flip_aug = true", keys))
    done = train_qwen([*tiny_arguments, *settings(config, tmp_path), "--network_train_unet_only", *extra])
    assert done.status == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out" / "mine.safetensors").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [[], ["--cache_latents_to_disk"]], ids=["encoded in the step", "cached"])
def test_the_alpha_channel_is_trained_unless_it_is_used_as_a_mask(
    train_qwen: Train, tiny_arguments: list[str], tmp_path: Path, cache: list[str]
) -> None:
    """The disk cache distinguishes the latents of both cases."""
    weights = {}
    for folder in ("clear", "opaque"):
        for path in make_images(tmp_path / folder, 2).glob("*.png"):
            if folder == "clear":
                make_half_transparent(path)
    for name, folder, keys in (
        ("image", "clear", ""),
        ("mask", "clear", "alpha_mask = true"),
        ("opaque", "opaque", ""),
    ):
        config = tmp_path / "data.toml"
        config.write_text(
            f'[[datasets]]\nresolution = 64\nbatch_size = 2\n[[datasets.subsets]]\nclass_tokens = "cat"\n{keys}\n'
            f'image_dir = "{(tmp_path / folder).as_posix()}"\n'
        )
        done = train_qwen(
            [*tiny_arguments, *settings(config, tmp_path), *cache, "--output_name", name, "--network_train_unet_only"]
        )
        assert done.status == 0, done.stderr
        weights[name] = load_saved(tmp_path, name)
    assert not are_equal(weights["image"], weights["opaque"])
    assert not are_equal(weights["image"], weights["mask"]) and not are_equal(weights["mask"], weights["opaque"])
