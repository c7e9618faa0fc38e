"""qwen_image_21_train_network.py on a tiny model: musubi-tuner's commands, pairs, and alpha channels."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.running import ROOT, Finished, make_images
from tests.tiny.qwen_image_21 import CONFIG, build_tiny_qwen_image_21
from tools import choose_checkpoint

Train = Callable[..., Finished]

# The three documented commands of musubi-tuner, without its script folder and accelerate's launcher; instead of
# --vae_tiling, meant for large images, they set the VAE's batch size.
LATENTS = "--dataset_config {data} --vae {vae} --batch_size 2"
TEXTS = "--dataset_config {data} --text_encoder {text} --batch_size 1"
TRAINING = (
    "--dit {dit} --dataset_config {data} --sdpa --mixed_precision bf16 --gradient_checkpointing "
    "--network_module networks.lora_qwen_image_21 --network_dim 16 --network_alpha 16 --optimizer_type AdamW "
    "--learning_rate 1e-4 --timestep_sampling shift --discrete_flow_shift 3.0 --weighting_scheme none "
    "--max_train_steps 2 --save_every_n_steps 200 --output_dir {out} --output_name qwen_image_21_lora"
)
NUM_LAYERS = 7 * CONFIG.num_blocks


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


def load_saved(tmp_path: Path, name: str = "mine") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[key]) for key, weight in a.items())


def run_command(script: str, words: str, names: dict[str, str]) -> str:
    line = [sys.executable, str(ROOT / f"{script}.py"), *words.format(**names).split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.nightly
def test_the_commands_of_musubi_tuner_cache_and_train(
    train_qwen: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    """Text-to-image training from caches needs neither VAE nor text encoder."""
    make_images(tmp_path / "images", 3)
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = [96, 64]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        f'\n[[datasets]]\nimage_directory = "{tmp_path / "images"}"\n'
    )
    names = {
        "dit": tiny_arguments[1], "vae": tiny_arguments[3], "text": tiny_arguments[5],
        "data": str(tmp_path / "data.toml"), "out": str(tmp_path / "out"),
    }  # fmt: skip
    log = run_command("qwen_image_21_cache_latents", LATENTS, names)
    assert "latent cache: 0 entries reused, 3 to encode" in log
    log = run_command("qwen_image_21_cache_text_encoder_outputs", TEXTS, names)
    assert "text cache: 0 files reused, 4 to encode" in log  # three captions and the empty one
    tokenizer = ["--tokenizer_cache_dir", str(Path(tiny_arguments[1]).parent)]
    done = train_qwen([*TRAINING.format(**names).split(), *tokenizer])
    assert done.status == 0, done.stderr
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert "text cache: 4 files reused, 0 to encode" in done.stderr
    file = tmp_path / "out" / "qwen_image_21_lora.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * NUM_LAYERS
    name = "transformer.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight"
    assert tensors[name].shape == (16, CONFIG.width)
    assert any(float(t.abs().max()) > 0 for key, t in tensors.items() if key.endswith("lora_B.weight"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "qwen_image_21"
    assert metadata["modelspec.architecture"] == "Qwen-Image-2.1/lora"


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
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4",
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


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--text_encoder", "missing.safetensors"], "--text_encoder missing.safetensors does not exist"),
        (["--network_train_text_encoder_only"], "its text encoder cannot be trained"),
        (["--timestep_sampling", "ideogram4_shift"], "invalid choice: 'ideogram4_shift'"),
        (["--model_version", "edit"], "there is one Qwen-Image 2.1"),
        (["--qwen3", "x.safetensors"], "use --text_encoder"),
        (["--fp8_llm"], "use --fp8_vl"),
    ],
    ids=str,
)
def test_invalid_values_end_the_run_before_loading(
    train_qwen: Train, tiny_arguments: list[str], images: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    done = train_qwen(
        [
            *tiny_arguments,
            "--train_data_dir",
            str(images),
            "--resolution",
            "64",
            *settings(Path("none.toml"), tmp_path)[2:],
            *extra,
        ]
    )
    assert done.status != 0 and message in done.stderr
