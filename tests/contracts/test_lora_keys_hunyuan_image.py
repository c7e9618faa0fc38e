"""HunyuanImage 2.1 adapter files have the shapes of sd-scripts under the names that ComfyUI reads, at full size."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.hunyuan_image.layers import NAMES, from_original
from library.architectures.hunyuan_image.model import HunyuanImage, read_config
from library.architectures.specs import list_specs
from library.checkpoints.compatibility import readings
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from library.models.adapter_views import view_denoiser
from networks.lora_hunyuan_image import create_network, create_network_from_weights
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import saved_shapes, saved_tensors
from tests.tiny.hunyuan_image import tiny_hunyuan_image

FACTS: Mapping[str, Any] = facts("lora_keys_hunyuan_image")
BASE: Mapping[str, Any] = facts("hunyuan_image")
COMFY: Mapping[str, str] = FACTS["comfy_names"]  # sd-scripts' module name -> name by its ComfyUI converter
DENOISER = {name: tuple(shape) for name, shape in BASE["components"]["dit"].items()}


def convert_to_comfy(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    renamed = {}
    for key, shape in shapes.items():
        module, _, leaf = key.partition(".")
        renamed[f"{COMFY.get(module, module)}.{leaf}"] = shape
    return renamed


@cache
def full_size_models() -> tuple[Any, nn.Module]:
    with torch.device("meta"):
        return view_denoiser([], HunyuanImage(read_config(DENOISER)))


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    return full_size_models()[1]


def shapes_of(denoiser: nn.Module, **args: str) -> dict[str, list[int]]:
    return saved_shapes(create_network, ([], denoiser), **args)


def test_the_denoiser_has_the_names_and_shapes_of_the_file() -> None:
    with torch.device("meta"):
        model = HunyuanImage(read_config(DENOISER))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        from_original(name): shape if len(shape) < 4 else shape[:2] for name, shape in DENOISER.items()
    }
    assert len(DENOISER) == 856
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 17_425_795_520


@pytest.mark.parametrize(
    ("expression", "end"), [("img_mlp_fc1", "img_mlp_0"), ("txt_mlp_2", "txt_mlp_2"), ("_mod_linear", "_mod_lin")]
)
def test_patterns_match_both_spellings_of_a_name(denoiser: nn.Module, expression: str, end: str) -> None:
    shapes = shapes_of(denoiser, network_reg_dims=f"{expression}=9")
    wide = {
        key.partition(".")[0] for key, shape in shapes.items() if key.endswith("lora_down.weight") and shape[0] == 9
    }
    assert wide == {key.partition(".")[0] for key in shapes if key.partition(".")[0].endswith(end)} and wide


def write_random_file(path: Path, denoiser: nn.Module, theirs: bool) -> dict[str, Tensor]:
    """Write an adapter of rank 3 and alpha 2 and return its tensors under the names of our files."""
    generator = torch.Generator().manual_seed(11)
    network = create_network(1.0, 3, 2.0, None, [], denoiser)
    tensors = {key: torch.randn(t.shape, generator=generator) for key, t in sorted(saved_tensors(network).items())}
    tensors |= {key: torch.tensor(2.0) for key in tensors if key.endswith(".alpha")}
    back = {new: old for old, new in COMFY.items()}
    saved = {
        back.get(key.partition(".")[0], key.partition(".")[0]) + key[key.index(".") :]: tensors[key] for key in tensors
    }
    save_safetensors(path, saved if theirs else tensors, {})
    return tensors


def test_files_by_sd_scripts_load_like_ours(tmp_path: Path) -> None:
    denoiser = view_denoiser([], tiny_hunyuan_image(1))[1]
    file = tmp_path / "theirs.safetensors"
    tensors = write_random_file(file, denoiser, theirs=True)
    assert any("mlp_fc1" in key for key in load_state_dict(file))
    loaded = create_network(1.0, 3, 2.0, None, [], denoiser)
    loaded.load_weights(str(file))
    taken, weights = create_network_from_weights(1.0, str(file), None, [], denoiser)
    taken.load_weights(str(file))
    for network in (loaded, taken):
        actual = saved_tensors(network)
        assert actual.keys() == tensors.keys()
        assert all(torch.equal(actual[key], tensors[key]) for key in tensors)
    assert weights.keys() == tensors.keys()


def test_files_by_sd_scripts_merge_like_ours(tmp_path: Path) -> None:
    merged = []
    for theirs in (True, False):
        model = tiny_hunyuan_image(1)
        denoiser = view_denoiser([], model)[1]
        file = tmp_path / f"{theirs}.safetensors"
        write_random_file(file, denoiser, theirs)
        network, weights = create_network_from_weights(0.5, str(file), None, [], denoiser, for_inference=True)
        network.merge_to([], denoiser, weights)
        merged.append(model.state_dict())
    before = tiny_hunyuan_image(1).state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[0][name])}
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in before)
    assert len(changed) == 2 * 10 + 2 * 3  # every Linear weight of the blocks


def test_ComfyUI_reads_all_of_our_file_and_part_of_one_by_sd_scripts(denoiser: nn.Module) -> None:
    amounts = []
    for shapes in (shapes_of(denoiser), FACTS["default"]):
        actual = readings(list_specs(), {key: tuple(shape) for key, shape in shapes.items()}, {})
        amounts += [reading.amount for reading in actual if reading.program == "ComfyUI"]
    assert amounts == ["all", "some"]


def test_the_generic_names_are_the_paths_in_ComfyUIs_model() -> None:
    generic = {module.kohya: module.generic for module in NAMES.modules}
    assert generic["lora_unet_double_blocks_3_img_attn_qkv"] == "diffusion_model.double_blocks.3.img_attn.qkv"
    assert generic["lora_unet_double_blocks_3_txt_mlp_2"] == "diffusion_model.double_blocks.3.txt_mlp.2"
    assert generic["lora_unet_single_blocks_39_modulation_lin"] == "diffusion_model.single_blocks.39.modulation.lin"
