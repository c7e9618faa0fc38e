"""Training scripts of SD 2.x, SDXL and SD 3 on tiny models, from images to adapter files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.running import Finished, load_saved, make_images, small_run
from tests.tiny.sd3 import build_tiny_sd3

Train = Callable[..., Finished]
OUTPUT = "mine.safetensors"


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a builder of arguments for two training steps on a tiny model of the given size."""
    make_images(tmp_path / "data" / "2_thing", 3)

    def build(size: str, module: str, *more: str) -> list[str]:
        model = build_tiny_sd3(tmp_path / "model", 11, size)
        return [
            "--pretrained_model_name_or_path", str(model), *small_run(tmp_path / "data", tmp_path, module, "2"),
            "--learning_rate", "1e-2", "--t5xxl_max_token_length", "16", *more,
        ]  # fmt: skip

    return build


def run(train: Train, arguments: list[str]) -> Finished:
    done = train(arguments, script="sd3_train_network").ok()
    return done


def test_all_sd3_specific_options_work_together(
    train: Train, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = [
        "--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
        "--gradient_checkpointing", "--weighting_scheme", "logit_normal", "--logit_mean", "0.3", "--loss_type", "huber",
        "--training_shift", "3", "--clip_l_dropout_rate", "0.3", "--t5_dropout_rate", "0.5",
        "--pos_emb_random_crop_rate", "0.5", "--apply_t5_attn_mask", "--apply_lg_attn_mask", "--min_timestep", "100",
        "--mixed_precision", "bf16", "--network_args", "split_qkv=True", "emb_dims=[2,2,2,2,2,2]",
        "train_block_indices=0-1", "context_mod_dim=0",
    ]  # fmt: skip
    first = run(train, arguments("sd3.5-medium", "networks.lora_sd3", *more))
    weights = load_file(tmp_path / "out" / OUTPUT)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert weights["lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_down.weight"].shape[0] == 12
    assert "lora_unet_final_layer_linear.alpha" in weights
    assert not any("joint_blocks_2" in key or "context_block_adaLN" in key or "lora_te" in key for key in weights)
    cached = sorted(path.name for path in (tmp_path / "data" / "2_thing").glob("0*.npz"))
    assert cached == sorted(f"0{i}{end}" for i in range(3) for end in ("_0064x0064_sd3.npz", "_sd3_te.npz"))
    again = run(train, arguments("sd3.5-medium", "networks.lora_sd3", *more))
    assert again.losses == first.losses, "from the caches, with the same draws"


@pytest.mark.nightly
def test_a_resumed_run_equals_the_uninterrupted_one(
    train: Train, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Text encoder dropout and random crops of the position table depend on the batch, not on earlier draws."""
    more = ["--clip_g_dropout_rate", "0.4", "--t5_dropout_rate", "0.4", "--pos_emb_random_crop_rate", "0.5"]
    line = arguments("sd3.5-medium", "networks.lora_sd3", "--network_train_unet_only", *more, "--max_train_steps", "4")
    run(train, [*line, "--save_state", "--save_every_n_steps", "2"])
    state = str(tmp_path / "out" / "mine-step00000002-state")
    run(train, [*line, "--resume", state, "--output_name", "resumed"])
    uninterrupted, resumed = load_saved(tmp_path), load_saved(tmp_path, "resumed")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)
    assert any("lora_up" in key and tensor.abs().max() > 0 for key, tensor in uninterrupted.items())


def test_position_embeddings_are_scaled_to_the_dataset_resolution(
    train: Train, arguments: Callable[..., list[str]]
) -> None:
    words = arguments("sd3.5-medium", "networks.lora", "--max_train_steps", "1", "--network_train_unet_only")
    plain = run(train, words)
    stretched = run(train, [*words, "--enable_scaled_pos_embed", "--pos_emb_random_crop_rate", "1"])
    assert "positions scaled to squares of (4,) patches" in stretched.stderr
    assert stretched.losses != plain.losses


# sdxl_train_network.py and train_network.py --v2 end to end on tiny models.

SDXL = "sdxl_train_network"


@pytest.fixture
def sdxl_arguments(tiny_sdxl_folder: Path, images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for two training steps on the tiny model."""
    return [
        "--pretrained_model_name_or_path",
        str(tiny_sdxl_folder),
        *small_run(images, tmp_path, "networks.lora", "2"),
    ]


def up_factors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name.endswith("lora_up.weight")}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_each_text_encoder_has_its_own_learning_rate(train: Train, sdxl_arguments: list[str], tmp_path: Path) -> None:
    train([*sdxl_arguments, "--text_encoder_lr", "0", "1e-3"], script=SDXL).ok()
    ups = up_factors(tmp_path / "out" / "mine.safetensors")
    moved = {name.split("_")[1] for name, up in ups.items() if up.abs().max() > 0}
    assert moved == {"te2", "unet"}


def test_cached_text_gives_the_same_loss_and_uses_sd_scripts_file_names(
    train: Train, sdxl_arguments: list[str], images: Path
) -> None:
    options = [*sdxl_arguments, "--network_train_unet_only", "--cache_latents_to_disk"]
    plain = train(options, script=SDXL)
    cache = [*options, "--cache_text_encoder_outputs_to_disk", "--output_name", "cached"]
    done = train(cache, script=SDXL).ok()
    assert done.losses[0] == plain.losses[0]  # later losses depend on the adapters' initialisation
    files = sorted(images.rglob("0*_te_outputs.npz"))
    assert [file.name for file in files][:2] == ["00_te_outputs.npz", "01_te_outputs.npz"] and len(files) == 6
    with np.load(files[0]) as stored:
        shapes = {name: stored[name].shape for name in ("hidden_state1", "hidden_state2", "pool2")}
    assert len(list(images.rglob("*_0064x0064_sdxl.npz"))) == 6
    assert shapes == {"hidden_state1": (77, 32), "hidden_state2": (77, 48), "pool2": (48,)}


@pytest.mark.parametrize("model", ["tiny_sd2_folder", "tiny_sd2_file"])
def test_sd2_with_v_prediction_trains(
    train: Train, base_arguments: list[str], tmp_path: Path, model: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    options = ["--pretrained_model_name_or_path", str(path), "--v2", "--v_parameterization", "--max_train_steps", "2"]
    train([*base_arguments, *options]).ok()
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    assert (actual["ss_v2"], actual["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert actual["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert all(up.abs().max() > 0 for up in up_factors(tmp_path / "out" / "mine.safetensors").values())
