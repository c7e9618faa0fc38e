"""krea2_train_network.py on a tiny Krea 2 model: musubi-tuner's commands, previews, resuming, and third-party
files."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.running import ROOT, Finished, make_images
from tests.tiny.krea2 import CONFIG, build_tiny_krea2

Train = Callable[..., Finished]

# The three documented commands of musubi-tuner, without its script folder and accelerate's launcher.
LATENTS = "--dataset_config {data} --vae {vae}"
TEXTS = "--dataset_config {data} --text_encoder {text} --batch_size 2"
TRAINING = (
    "--dit {dit} --vae {vae} --dataset_config {data} --sdpa --mixed_precision bf16 --timestep_sampling shift "
    "--weighting_scheme none --discrete_flow_shift 2.5 --optimizer_type AdamW --learning_rate 1e-4 "
    "--gradient_checkpointing --max_data_loader_n_workers 2 --persistent_data_loader_workers "
    "--network_module networks.lora_krea2 --network_dim 32 --network_alpha 32 --max_train_epochs 1 "
    "--save_every_n_epochs 1 --seed 42 --output_dir {out} --output_name name-of-lora"
)
SHOWN = ("--sample_prompts", "prompts.txt", "--sample_at_first")
NUM_LAYERS = 8 * (CONFIG.num_blocks + CONFIG.num_layerwise + CONFIG.num_refiners) + 8


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_krea2(tmp_path_factory.mktemp("tiny_krea2"), seed=31)


@pytest.fixture
def train_krea2(train: Train) -> Train:
    return partial(train, script="krea2_train_network")


@pytest.fixture
def arguments(tiny_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps."""
    return [
        *tiny_arguments, "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64",
        "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module",
        "networks.lora_krea2", "--network_dim", "4", "--learning_rate", "1e-3", "--max_train_steps", "2", "--seed",
        "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


@pytest.fixture
def path_replacements(tiny_arguments: list[str], tmp_path: Path) -> dict[str, str]:
    """Return replacements for the paths in the documented commands."""
    make_images(tmp_path / "images", 3)
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = [80, 64]\ncaption_extension = ".txt"\nbatch_size = 1\nenable_bucket = true\n'
        "bucket_no_upscale = false\n\n[[datasets]]\n"
        f'image_directory = "{tmp_path / "images"}"\ncache_directory = "{tmp_path / "cache"}"\nnum_repeats = 1\n'
    )
    dit, vae, text = tiny_arguments[1::2]
    return {"dit": dit, "vae": vae, "text": text, "data": str(tmp_path / "data.toml"), "out": str(tmp_path / "out")}


def run_command(script: str, words: str, path_replacements: dict[str, str]) -> Finished:
    line = [sys.executable, str(ROOT / f"{script}.py"), *words.format(**path_replacements).split()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.nightly
def test_the_commands_of_musubi_tuner_cache_and_train(
    train_krea2: Train, path_replacements: dict[str, str], tmp_path: Path
) -> None:
    """Caption features are stored unpadded in 16 bits, and their size is reported before encoding."""
    first = run_command("krea2_cache_latents", LATENTS, path_replacements)
    assert "latent cache: 0 entries reused, 3 to encode" in first.stderr
    texts = run_command("krea2_cache_text_encoder_outputs", TEXTS, path_replacements)
    assert "text cache: 0 files reused, 4 to encode" in texts.stderr  # three captions and the empty one
    num_tokens = []
    for file in (tmp_path / "images").glob("*_krea2_te.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.dtype == np.uint16 and states.shape == (len(mask), 12 * CONFIG.fusion.width) and mask.all()
        num_tokens.append(len(mask))
    assert len(num_tokens) == 4 and len(set(num_tokens)) > 1
    size = 2 * 12 * CONFIG.fusion.width * sum(num_tokens) / 1e6
    assert f"caching text encoder outputs of 4 captions on disk, about {size:.1f} MB" in texts.stderr
    done = train_krea2(TRAINING.format(**path_replacements).split())  # without the text encoder
    assert done.status == 0, done.stderr
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert "text cache: 4 files reused, 0 to encode" in done.stderr
    file = tmp_path / "out" / "name-of-lora.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * NUM_LAYERS
    assert tensors["diffusion_model.blocks.0.attn.wq.lora_A.weight"].shape == (32, CONFIG.block.width)
    assert any(float(t.abs().max()) > 0 for key, t in tensors.items() if key.endswith("lora_B.weight"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "krea2"
    assert metadata["modelspec.architecture"] == "Krea-2/lora"


def test_a_resumed_run_equals_the_uninterrupted_one(train_krea2: Train, arguments: list[str], tmp_path: Path) -> None:
    """Captions of several lengths in a batch are cached in memory; a preview is drawn before the first step."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1 --s 2\n")
    more = ["--cache_text_encoder_outputs", "--sample_prompts", str(prompts), "--sample_at_first", "--save_state"]
    steps = [*arguments, *more, "--max_train_steps", "4"]
    uninterrupted = train_krea2([*steps, "--save_every_n_steps", "2"])
    assert uninterrupted.status == 0, uninterrupted.stderr
    state = str(tmp_path / "out" / "mine-step00000002-state")
    rest = train_krea2([*steps, "--output_dir", str(tmp_path / "rest"), "--resume", state])
    assert rest.status == 0, rest.stderr
    assert rest.losses == uninterrupted.losses[2:] and len(uninterrupted.losses) == 4
    expected, other = (load_file(tmp_path / name / "mine.safetensors") for name in ("out", "rest"))
    assert expected.keys() == other.keys()
    assert all(torch.equal(expected[key], other[key]) for key in expected)
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1


@pytest.mark.nightly
def test_our_option_names_give_the_same_result(train_krea2: Train, path_replacements: dict[str, str]) -> None:
    theirs = train_krea2([*TRAINING.format(**path_replacements).split(), "--text_encoder", path_replacements["text"]])
    words = TRAINING.replace("--dit {dit}", "--pretrained_model_name_or_path {dit} --text_encoder {text}") + (
        " --cache_latents_to_disk --cache_text_encoder_outputs_to_disk"
    )
    ours = train_krea2(words.format(**path_replacements).split())
    assert theirs.status == ours.status == 0, ours.stderr
    assert theirs.losses == ours.losses and len(ours.losses) == 3


@pytest.mark.nightly
def test_musubi_tuners_fp8_and_block_swap_options_train(train_krea2: Train, path_replacements: dict[str, str]) -> None:
    words = [*TRAINING.format(**path_replacements).split(), "--text_encoder", path_replacements["text"]]
    done = train_krea2([*words, "--fp8_base", "--fp8_scaled", "--fp8_text_encoder"])
    assert done.status == 0, done.stderr
    assert "layers in 8 bits" in done.stderr
    done = train_krea2([*words, "--blocks_to_swap", "26"])
    assert done.status == 1 and "at most 0" in done.stderr


@pytest.mark.nightly
def test_training_continues_from_a_musubi_tuner_file(train_krea2: Train, arguments: list[str], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = {}
    for part, rows in (("attn_wk", CONFIG.block.width // 2), ("attn_gate", CONFIG.block.width)):
        stem = f"lora_unet_blocks_0_{part}"
        theirs[f"{stem}.lora_down.weight"] = torch.randn(2, CONFIG.block.width, generator=generator)
        theirs[f"{stem}.lora_up.weight"] = 0.01 * torch.randn(rows, 2, generator=generator)
        theirs[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(theirs, tmp_path / "musubi.safetensors")
    done = train_krea2([*arguments, "--network_weights", str(tmp_path / "musubi.safetensors"), "--dim_from_weights"])
    assert done.status == 0, done.stderr
    saved = load_file(tmp_path / "out" / "mine.safetensors")
    assert {key: t.shape[0] for key, t in saved.items() if key.endswith("lora_A.weight")} == {
        f"diffusion_model.blocks.0.attn.{part}.lora_A.weight": 2 for part in ("wk", "gate")
    }


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--text_encoder", "missing.safetensors"], "--text_encoder missing.safetensors does not exist"),
        (["--network_train_text_encoder_only"], "its text encoder cannot be trained"),
        (["--model_version", "turbo"], "use --dit_variant"),
        (["--dit_variant", "base"], "invalid choice: 'base'"),
        (["--fp8_vl"], "use --fp8_text_encoder"),
        (["--guidance_scale", "1.0"], "the model is trained without guidance"),
        (["--turbo_dit", "missing.safetensors"], "--turbo_dit missing.safetensors does not exist"),
        (["--turbo_dit", "x.safetensors", *SHOWN, "--blocks_to_swap", "2"], "previews swap all weights in place"),
        (["--turbo_dit", "x.safetensors", *SHOWN, "--base_weights", "y"], "previews would lack them"),
    ],
    ids=str,
)
def test_invalid_values_end_the_run_before_loading(
    train_krea2: Train, arguments: list[str], extra: list[str], message: str
) -> None:
    done = train_krea2([*arguments, *extra])
    assert done.status != 0 and message in done.stderr


def test_previews_use_turbo_and_do_not_change_training(
    train_krea2: Train, arguments: list[str], tmp_path: Path
) -> None:
    """The adapter starts at 0, so the first image is Turbo's; losses equal those without previews, bit for bit."""
    turbo = build_tiny_krea2(tmp_path / "other", seed=77, name="turbo")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --d 1\n")
    shown = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "1"]
    plain = train_krea2(arguments)
    for more in ([], ["--base_format", "int8"]):
        out = tmp_path / f"out{len(more)}"
        done = train_krea2([*arguments, *shown, *more, "--turbo_dit", turbo[1], "--output_dir", str(out)])
        assert done.status == 0, done.stderr
        images = [path.read_bytes() for path in sorted((out / "sample").glob("*.png"))]
        assert len(images) == 3 and len(set(images)) == 3
        if not more:
            assert done.losses == plain.losses and len(done.losses) == 2
    turbo_arguments = ["--output_dir", str(tmp_path / "turbo"), "--max_train_steps", "1"]
    other = train_krea2([arguments[0], turbo[1], *arguments[2:], *shown, *turbo_arguments])
    assert other.status == 0 and "is Krea 2 Turbo, which is distilled" in other.stderr
    before = [next((tmp_path / name / "sample").glob("*_e000000_*.png")).read_bytes() for name in ("out0", "turbo")]
    assert before[0] == before[1]
    first, two = (load_file(tmp_path / name / "mine.safetensors") for name in ("out", "out0"))
    assert all(torch.equal(first[key], two[key]) for key in first)
