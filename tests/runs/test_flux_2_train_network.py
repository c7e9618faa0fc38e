"""flux_2_train_network.py on tiny FLUX.2 models: musubi-tuner's commands, previews, and third-party files."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.running import ROOT, Finished, make_images
from tests.tiny.flux_2 import CONFIG, build_tiny_flux_2

Train = Callable[..., Finished]

# The three documented commands of musubi-tuner, without its script folder and accelerate's launcher.
LATENTS = "--dataset_config {data} --vae {vae} --model_version {version}"
TEXTS = "--dataset_config {data} --text_encoder {text} --batch_size 16 --model_version {version}"
TRAINING = (
    "--model_version {version} --dit {dit} --vae {vae} --text_encoder {text} --dataset_config {data} --sdpa "
    "--mixed_precision bf16 --timestep_sampling flux2_shift --weighting_scheme none --optimizer_type {optimizer} "
    "--learning_rate 1e-4 --gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers "
    "--network_module networks.lora_flux_2 --network_dim 32 --max_train_epochs {epochs} --save_every_n_epochs 1 "
    "--seed 42 --output_dir {out} --output_name name-of-lora"
)
NUM_LAYERS = 8 * CONFIG.num_double + 2 * CONFIG.num_single


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux_2(tmp_path_factory.mktemp("tiny_flux_2"), seed=31)


@pytest.fixture(scope="session")
def tiny_dev(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_flux_2(tmp_path_factory.mktemp("tiny_flux_2_dev"), seed=32, is_dev=True)


@pytest.fixture
def train_flux_2(train: Train) -> Train:
    return partial(train, script="flux_2_train_network")


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps, without those of the base model."""
    return [
        "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size",
        "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_flux_2", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed",
        "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


@pytest.fixture
def arguments(tiny_arguments: list[str], settings: list[str]) -> list[str]:
    return [*tiny_arguments, *settings]


def path_replacements_of(model: list[str], version: str, tmp_path: Path) -> dict[str, str]:
    """Return replacements for the paths in the documented commands."""
    make_images(tmp_path / "images", 3)
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = [80, 64]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        "bucket_no_upscale = false\n\n[[datasets]]\n"
        f'image_directory = "{tmp_path / "images"}"\ncache_directory = "{tmp_path / "cache"}"\nnum_repeats = 1\n'
    )
    return {
        "dit": model[1], "vae": model[3], "text": model[5], "data": str(tmp_path / "data.toml"), "optimizer": "AdamW",
        "epochs": "1", "out": str(tmp_path / "out"), "version": version,
    }  # fmt: skip


@pytest.fixture
def path_replacements(tiny_arguments: list[str], tmp_path: Path) -> dict[str, str]:
    return path_replacements_of(tiny_arguments, "klein-base-4b", tmp_path)


def run_command(script: str, words: str, path_replacements: dict[str, str]) -> Finished:
    line = [sys.executable, str(ROOT / f"{script}.py"), *words.format(**path_replacements).split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("version", ["klein-base-4b", pytest.param("dev", marks=pytest.mark.nightly)])
def test_the_commands_of_musubi_tuner_cache_and_train(
    train_flux_2: Train, tiny_arguments: list[str], tiny_dev: list[str], tmp_path: Path, version: str
) -> None:
    path_replacements = path_replacements_of(tiny_dev if version == "dev" else tiny_arguments, version, tmp_path)
    first = run_command("flux_2_cache_latents", LATENTS, path_replacements)
    assert "latent cache: 0 entries reused, 3 to encode" in first.stderr
    texts = run_command("flux_2_cache_text_encoder_outputs", TEXTS, path_replacements)
    assert "text cache: 0 files reused, 4 to encode" in texts.stderr  # three captions and the empty one
    assert len(list((tmp_path / "images").glob("*_flux_2.npz"))) == 3
    done = train_flux_2(TRAINING.format(**path_replacements).split())
    assert done.status == 0, done.stderr
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert "text cache: 4 files reused, 0 to encode" in done.stderr
    assert ("which is distilled" in done.stderr) == (version == "dev")
    file = tmp_path / "out" / "name-of-lora.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * NUM_LAYERS
    assert tensors["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"].shape == (32, CONFIG.width)
    assert any(float(t.abs().max()) > 0 for key, t in tensors.items() if key.endswith("lora_B.weight"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "flux_2"
    assert metadata["modelspec.architecture"] == f"Flux.2-{version.replace('base-', '')}/lora"


def test_our_option_names_give_the_same_result(
    train_flux_2: Train, path_replacements: dict[str, str], tmp_path: Path
) -> None:
    theirs = train_flux_2(TRAINING.format(**path_replacements).split())
    words = TRAINING.replace("--dit {dit}", "--pretrained_model_name_or_path {dit}") + (
        " --cache_latents_to_disk --cache_text_encoder_outputs_to_disk"
    )
    ours = train_flux_2(words.format(**path_replacements).replace("flux2_shift", "flux_shift").split())
    assert theirs.status == ours.status == 0, ours.stderr
    assert theirs.losses == ours.losses and len(ours.losses) == 3


@pytest.mark.parametrize(
    ("script", "flag"), [("flux_2_cache_latents", "--vae"), ("flux_2_cache_text_encoder_outputs", "--text_encoder")]
)
def test_a_caching_command_names_the_missing_file(path_replacements: dict[str, str], script: str, flag: str) -> None:
    line = [sys.executable, str(ROOT / f"{script}.py"), "--dataset_config", path_replacements["data"]]
    for more, message in (
        ([], f"{flag} is missing: name its file or folder, or the whole model with --dit"),
        ([flag, path_replacements["dit"]], f"{flag} {path_replacements['dit']} is not a"),
    ):
        done = subprocess.run([*line, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_musubi_tuners_fp8_and_block_swap_options_train(train_flux_2: Train, path_replacements: dict[str, str]) -> None:
    done = train_flux_2(
        [*TRAINING.format(**path_replacements).split(), "--fp8_base", "--fp8_scaled", "--fp8_text_encoder"]
    )
    assert done.status == 0, done.stderr
    assert "layers in 8 bits" in done.stderr
    done = train_flux_2([*TRAINING.format(**path_replacements).split(), "--blocks_to_swap", "29"])
    assert done.status == 1 and "at most 0" in done.stderr


@pytest.mark.parametrize("version", ["klein-4b", "klein-base-4b", "dev"])
def test_a_preview_uses_the_settings_of_its_model_version(
    train_flux_2: Train, tiny_arguments: list[str], tiny_dev: list[str], settings: list[str], tmp_path: Path,
    version: str,
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1" + ("" if version == "klein-4b" else " --s 3") + "\n")
    model = tiny_dev if version == "dev" else tiny_arguments
    shown = ["--sample_prompts", str(prompts), "--sample_at_first", "--max_train_steps", "1"]
    done = train_flux_2([*model, *settings, *shown, "--model_version", version])
    assert done.status == 0, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert ("which is distilled" in done.stderr) == (version != "klein-base-4b")


def test_training_continues_from_a_musubi_tuner_file(train_flux_2: Train, arguments: list[str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = {}
    for part, rows in (("img_attn_qkv", 3), ("txt_attn_proj", 1)):
        stem = f"lora_unet_double_blocks_0_{part}"
        theirs[f"{stem}.lora_down.weight"] = torch.randn(2, CONFIG.width, generator=generator)
        theirs[f"{stem}.lora_up.weight"] = 0.01 * torch.randn(rows * CONFIG.width, 2, generator=generator)
        theirs[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(theirs, tmp_path / "musubi.safetensors")
    done = train_flux_2([*arguments, "--network_weights", str(tmp_path / "musubi.safetensors"), "--dim_from_weights"])
    assert done.status == 0, done.stderr
    saved = load_file(tmp_path / "out" / "mine.safetensors")
    assert {key: t.shape[0] for key, t in saved.items() if key.endswith("lora_A.weight")} == {
        f"diffusion_model.double_blocks.0.{part}.lora_A.weight": 2 for part in ("img_attn.qkv", "txt_attn.proj")
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--text_encoder", "missing.safetensors"], "--text_encoder missing.safetensors does not exist"),
        (["--network_train_text_encoder_only"], "its text encoder cannot be trained"),
        (["--timestep_sampling", "ideogram4_shift"], "invalid choice: 'ideogram4_shift'"),
        (["--model_version", "dev"], "--model_version is dev, but"),
        (["--model_version", "klein"], "invalid choice: 'klein'"),
        (["--qwen3", "x.safetensors"], "use --text_encoder"),
        (["--guidance_scale", "1.0"], "dev is trained with a guidance of 1"),
    ],
    ids=str,
)
def test_invalid_values_end_the_run_before_loading(
    train_flux_2: Train, arguments: list[str], extra: list[str], message: str
) -> None:
    done = train_flux_2([*arguments, *extra])
    assert done.status != 0 and message in done.stderr
