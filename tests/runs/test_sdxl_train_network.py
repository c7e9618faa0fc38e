"""sdxl_train_network.py and train_network.py --v2 end to end on tiny models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.running import Finished, small_run

Train = Callable[..., Finished]
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
    done = train([*sdxl_arguments, "--text_encoder_lr", "0", "1e-3"], script=SDXL)
    assert done.status == 0, done.stderr
    ups = up_factors(tmp_path / "out" / "mine.safetensors")
    moved = {name.split("_")[1] for name, up in ups.items() if up.abs().max() > 0}
    assert moved == {"te2", "unet"}


def test_cached_text_gives_the_same_loss_and_uses_sd_scripts_file_names(
    train: Train, sdxl_arguments: list[str], images: Path
) -> None:
    options = [*sdxl_arguments, "--network_train_unet_only", "--cache_latents_to_disk"]
    plain = train(options, script=SDXL)
    cache = [*options, "--cache_text_encoder_outputs_to_disk", "--output_name", "cached"]
    done = train(cache, script=SDXL)
    assert done.status == 0, done.stderr
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
    done = train([*base_arguments, *options])
    assert done.status == 0, done.stderr
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    assert (actual["ss_v2"], actual["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert actual["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert all(up.abs().max() > 0 for up in up_factors(tmp_path / "out" / "mine.safetensors").values())
