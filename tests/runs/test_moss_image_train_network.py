"""moss_image_train_network.py on a tiny model: a settings file for sd-scripts, and caching commands."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from library.checkpoints.headers import read_metadata
from tests.running import Finished
from tests.runs.musubi_tuner import paths_of, run_command
from tests.tiny.moss_image import CONFIG, build_tiny_moss_image

Train = Callable[..., Finished]

SETTINGS = """
pretrained_model_name_or_path = "{base}"
text_encoder = "{text}"
vae = "{vae}"
disable_mmap_load_safetensors = true
network_module = "networks.lora_generic"
network_dim = 32
network_alpha = 16
network_train_unet_only = true
timestep_sampling = "sigma"
weighting_scheme = "logit_normal"
logit_mean = -1.09
logit_std = 0.95
discrete_flow_shift = 1.0
gradient_checkpointing = true
unsloth_offload_checkpointing = true
sdpa = true
mixed_precision = "bf16"
cache_latents = true
cache_latents_to_disk = true
cache_text_encoder_outputs = true
cache_text_encoder_outputs_to_disk = true
loss_type = "l2"
optimizer_type = "AdamW"
learning_rate = 7.5e-5
resize_interpolation = "lanczos"
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
keep_tokens = 1
caption_extension = ".txt"
train_data_dir = "{images}"
resolution = "64"
output_dir = "{out}"
output_name = "mine"
max_train_steps = 2
max_data_loader_n_workers = 0
"""


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_moss_image(tmp_path_factory.mktemp("tiny_moss_image"), seed=31)


@pytest.fixture
def train_moss(train: Train) -> Train:
    return partial(train, script="moss_image_train_network")


def test_a_settings_file_for_sd_scripts_trains_and_saves_names_that_comfyui_finds(
    train_moss: Train, tiny_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    base, vae, text = tiny_arguments[1::2]
    values = {"base": base, "vae": vae, "text": text, "images": images.as_posix(), "out": (tmp_path / "out").as_posix()}
    (tmp_path / "settings.toml").write_text(SETTINGS.format(**values))
    done = train_moss(["--config_file", str(tmp_path / "settings.toml")])
    assert done.status == 0, done.stderr
    tensors = load_file(tmp_path / "out" / "mine.safetensors")
    layers = [f"proj.{name}" for name in ("q", "k", "v", "o", "ffn_up_gate", "ffn_down")]
    assert tensors.keys() == {
        f"diffusion_model.layers.{n}.{layer}.lora_{part}.weight"
        for n in range(CONFIG.num_layers)
        for layer in layers
        for part in "AB"
    }
    metadata = read_metadata(tmp_path / "out" / "mine.safetensors")
    assert metadata["ss_network_module"] == "networks.lora_generic"
    assert metadata["ss_base_model_version"] == "moss_image"


def test_caching_commands_fill_the_caches_that_training_reuses(
    train_moss: Train, tiny_arguments: list[str], tmp_path: Path
) -> None:
    paths = paths_of(tiny_arguments, tmp_path)
    run_command("moss_image_cache_latents", "--dataset_config {data} --vae {vae}", paths)
    run_command("moss_image_cache_text_encoder_outputs", "--dataset_config {data} --text_encoder {text}", paths)
    assert len(list(tmp_path.rglob("*_moss_latents.npz"))) == 3
    for file in tmp_path.rglob("*_moss_text.npz"):
        with np.load(file) as archive:
            states, mask = archive["hidden_state"], archive["attention_mask"]
        assert states.shape == (len(mask), CONFIG.text_width) and mask.all()
    words = "--dit {dit} --dataset_config {data} --output_dir {out} --network_module networks.lora --max_train_steps 1"
    done = train_moss([*words.format(**paths).split(), "--mixed_precision", "bf16"])
    assert done.status == 0, done.stderr
    assert "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert re.search(r"text cache: \d files reused, 0 to encode", done.stderr)
