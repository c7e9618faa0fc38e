"""diffusers loads every key of our files, in Kohya and diffusers naming, and computes the same as the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.architectures.sd.layers import view
from library.architectures.specs import list_specs
from library.checkpoints.compatibility import readings
from library.checkpoints.saving import save_safetensors
from networks.core.network.network import AdapterNetwork
from networks.lora import create_network
from tests.tolerances import FLOAT32_DEEP
from tools.convert_lora import convert

MODULES = {"attention": {}, "attention and convolutions": {"conv_dim": "2", "conv_alpha": "1.5"}}


def load_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)


def install_random_network(pipeline: Any, seed: int, **args: str) -> AdapterNetwork:
    """Install a network of rank 3 and alpha 2 with random weights on the pipeline's models."""
    models = view([pipeline.text_encoder], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models, **args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.apply_to(*models)
    return network


@torch.no_grad()
def predict(pipeline: Any, seed: int) -> Tensor:
    """Return the outputs of the U-Net for random latents and of the text encoder for random tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    ids_BT = torch.randint(0, 90, (2, 77), generator=generator)
    text_BTC = pipeline.text_encoder(ids_BT).last_hidden_state
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample


def num_adapted(pipeline: Any) -> int:
    """Return the number of modules on which diffusers has installed a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = (pipeline.unet, pipeline.text_encoder)
    return sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())


MAGNITUDES = {"dora_wd": "True", "wd_on_output": "True", "conv_dim": "2"}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", MODULES)
def test_diffusers_predicts_the_same_with_our_file(
    tiny_sd_folder: Path, tmp_path: Path, naming: Any, kind: str
) -> None:
    seed = 7000 + 10 * list(MODULES).index(kind) + len(naming)
    pipeline = load_pipeline(tiny_sd_folder)
    alone = predict(pipeline, seed)
    network = install_random_network(pipeline, seed + 1, **MODULES[kind])
    ours = predict(pipeline, seed)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", naming, drop_unsupported=False)
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert num_adapted(pipeline) == len(network.adapters)
    torch.testing.assert_close(predict(pipeline, seed), ours, **FLOAT32_DEEP)


def test_output_magnitudes_load_as_pefts_dora_in_diffusers_and_convert_back(
    tiny_sd_folder: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(tiny_sd_folder)
    alone = predict(pipeline, 7061)
    network = install_random_network(pipeline, 7062, **MAGNITUDES)
    ours = predict(pipeline, 7061)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "diffusers", drop_unsupported=False)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "theirs.safetensors").items()}
    assert sum(key.endswith(".lora_magnitude_vector.weight") for key in shapes) == len(network.adapters)
    (reading_of_diffusers,) = (
        reading for reading in readings(list_specs(), shapes, {}) if reading.program == "diffusers"
    )
    assert reading_of_diffusers.amount == "all"
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert num_adapted(pipeline) == len(network.adapters)
    torch.testing.assert_close(predict(pipeline, 7061), ours, **FLOAT32_DEEP)
    convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", "kohya", drop_unsupported=False)
    first, back = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "back.safetensors")
    for key in (key for key in first if key.endswith("dora_scale")):
        torch.testing.assert_close(back[key], first[key], rtol=0, atol=0)


UNET = "lora_unet_down_blocks_0_attentions_0_proj_in"
NORM = "lora_unet_conv_norm_out"
OWN = "unet.down_blocks.0.attentions.0.proj_in"
GENERIC = "diffusion_model.input_blocks.1.1.proj_in"
LORA = {f"{UNET}.lora_down.weight": torch.ones(2, 16, 1, 1), f"{UNET}.lora_up.weight": torch.ones(16, 2, 1, 1)}
LORA_AB = {f"{OWN}.lora_A.weight": torch.ones(2, 16, 1, 1), f"{OWN}.lora_B.weight": torch.ones(16, 2, 1, 1)}
ODD_FILES: dict[str, dict[str, Tensor]] = {
    "Tucker": {**LORA, f"{UNET}.lora_mid.weight": torch.ones(2, 2, 1, 1)},
    "norms": {**LORA, f"{NORM}.w_norm": torch.ones(16), f"{NORM}.b_norm": torch.ones(16)},
    "LoKr": {f"{UNET}.lokr_w1": torch.ones(4, 4), f"{UNET}.lokr_w2": torch.ones(4, 4), f"{UNET}.alpha": torch.ones(())},
    "alpha in its own naming": {**LORA_AB, f"{OWN}.alpha": torch.ones(())},
    "two namings": {**LORA, **{key.replace(OWN, GENERIC): tensor for key, tensor in LORA_AB.items()}},
    "DoRA": {**LORA, f"{UNET}.dora_scale": torch.ones(1, 16, 1, 1)},
    "DoRA by PEFT": {**LORA_AB, f"{OWN}.lora_magnitude_vector": torch.ones(1, 16, 1, 1)},
    "LoRA": LORA,
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_our_claims_about_diffusers_match_its_behaviour(tiny_sd_folder: Path, tmp_path: Path, what: str) -> None:
    tensors = ODD_FILES[what]
    save_safetensors(tmp_path / "odd.safetensors", tensors)
    shapes = {key: t.shape for key, t in tensors.items()}
    (claim,) = (reading for reading in readings(list_specs(), shapes, {}) if reading.program == "diffusers")
    pipeline = load_pipeline(tiny_sd_folder)
    try:
        pipeline.load_lora_weights(tmp_path, weight_name="odd.safetensors")
    except ValueError:
        assert claim.amount == "none"
    assert num_adapted(pipeline) == (0 if claim.amount == "none" else 1)
    assert claim.amount == {"LoRA": "all", "DoRA by PEFT": "all", "DoRA": "some"}.get(what, "none")
