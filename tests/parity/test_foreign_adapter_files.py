"""Files with diffusers names train further and merge into base models like those with Kohya names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.sdxl.assembly import build
from library.architectures.sdxl.options import SdxlOptions
from library.options.model import ModelOptions
from networks.lora import create_network, create_network_from_weights
from tests.tolerances import EXACT
from tools.convert_lora import convert

Models = tuple[Any, Any]


@pytest.fixture
def models(tiny_sdxl_folder: Path) -> Models:
    arch = build(SdxlOptions(model=ModelOptions(pretrained_model_name_or_path=str(tiny_sdxl_folder))))
    return arch.view(arch.load.text_encoders(), arch.load.denoiser())


@pytest.fixture
def kohya_file(models: Models, tmp_path: Path) -> Path:
    """Write a LoRA of rank 4 and alpha 2 with random weights."""
    network = create_network(1.0, 4, 2.0, None, *models, conv_dim="4", conv_alpha="2")
    generator = torch.Generator().manual_seed(81)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(tmp_path / "kohya.safetensors"), None, {})
    return tmp_path / "kohya.safetensors"


def convert_to_diffusers_paths(file: Path, to: Path) -> Path:
    """Rewrite Kohya keys with the paths of diffusers' U-Net, as other trainers write SDXL files."""
    from library.architectures.sdxl.layers import NAMES

    aliases = {module.kohya: module.aliases[0] for module in NAMES.modules if module.kohya.startswith("lora_unet_")}
    tensors = {}
    for key, tensor in load_file(file).items():
        module, _, leaf = key.partition(".")
        tensors[f"{aliases.get(module, module)}.{leaf}"] = tensor
    save_file(tensors, to)
    assert any(key.startswith("lora_unet_down_blocks_1_attentions_0_") for key in tensors)
    return to


@pytest.mark.parametrize("naming", ["diffusers", "generic", "diffusers paths"])
def test_foreign_files_load_into_a_network(models: Models, kohya_file: Path, tmp_path: Path, naming: Any) -> None:
    other = tmp_path / "other.safetensors"
    if naming == "diffusers paths":
        convert_to_diffusers_paths(kohya_file, other)
    else:
        convert(kohya_file, other, naming, drop_unsupported=False)
    assert not load_file(other).keys() & {k for k in load_file(kohya_file) if "unet" in k}
    network = create_network(1.0, 4, 2.0, None, *models, conv_dim="4", conv_alpha="2")
    network.load_weights(str(other))
    wanted = load_file(kohya_file)
    for name, adapter in network.adapters.items():
        strength = float(wanted[f"{name}.alpha"]) / 4
        up, down = (wanted[f"{name}.{leaf}.weight"].flatten(1) for leaf in ("lora_up", "lora_down"))
        change = strength * (up @ down)
        state = adapter.change.state_dict()
        scale = adapter.change.alpha_value / 4  # type: ignore[union-attr]
        actual = scale * (state["lora_up.weight"].flatten(1) @ state["lora_down.weight"].flatten(1))
        torch.testing.assert_close(actual, change, **EXACT)  # scales are powers of two


@pytest.mark.parametrize("naming", ["diffusers", "diffusers paths"])
def test_foreign_files_merge_into_the_base_model(
    models: Models, kohya_file: Path, tmp_path: Path, tiny_sdxl_folder: Path, naming: Any
) -> None:
    other = tmp_path / "other.safetensors"
    if naming == "diffusers paths":
        convert_to_diffusers_paths(kohya_file, other)
    else:
        convert(kohya_file, other, naming, drop_unsupported=False)
    text, unet = models
    start = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merged = []
    for file in (kohya_file, other):
        unet.load_state_dict(start)
        network, weights = create_network_from_weights(0.5, str(file), None, text, unet, for_inference=True)
        network.merge_to(text, unet, weights)
        merged.append({name: tensor.clone() for name, tensor in unet.state_dict().items()})
    assert any(not torch.equal(merged[0][name], start[name]) for name in start)
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in start)


def test_keys_without_a_layer_in_the_base_model_are_named(models: Models, kohya_file: Path, tmp_path: Path) -> None:
    tensors = load_file(convert_to_diffusers_paths(kohya_file, tmp_path / "other.safetensors"))
    for leaf in ("lora_down.weight", "lora_up.weight"):
        tensors[f"lora_unet_down_blocks_9_attentions_0_proj_in.{leaf}"] = torch.ones(4, 4)
    save_file(tensors, tmp_path / "odd.safetensors")
    network = create_network(1.0, 4, 2.0, None, *models)
    with pytest.raises(ValueError, match="has no place for lora_unet_down_blocks_9_attentions_0_proj_in"):
        network.load_weights(str(tmp_path / "odd.safetensors"))
