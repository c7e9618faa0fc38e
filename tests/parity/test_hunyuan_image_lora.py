"""Saved HunyuanImage 2.1 adapters in the transformer of diffusers, on the same weights, also merged and compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.hunyuan_image.adapter_names import NAMES
from library.architectures.hunyuan_image.reference import diffusers_model
from library.models.adapter_views import view_denoiser
from networks import dylora, lora, lora_fa, lora_hunyuan_image
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.tiny.hunyuan_image import inputs, oracle_output, tiny_hunyuan_image
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize

DOORS = {"lora_hunyuan_image": lora_hunyuan_image, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}


def detached() -> dict[str, Tensor]:
    return {name: value.detach() for name, value in inputs(3, 5).items()}


def save_trained_file(network_module: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; return the predictions without and with it."""
    model = tiny_hunyuan_image(7)
    _, seen = view_denoiser([], model)
    return save_trained(network_module, path, arguments, seen, lambda: model(*detached().values()))


@pytest.mark.parametrize(
    ("network_module", "arguments"),
    [
        ("lora_hunyuan_image", {}),
        ("lora_hunyuan_image", {"split_qkv": "True"}),
        ("lora", {"use_scalar": "True", "network_reg_dims": "_mod_=0"}),
        ("lora_fa", {}),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_file_and_predicts_the_same(
    network_module: str, arguments: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "ours.safetensors"
    base, expected = save_trained_file(DOORS[network_module], path, arguments)
    assert (expected - base).abs().max() > 0.01
    theirs = diffusers_model(tiny_hunyuan_image(7))
    renamed = rename(read_adapter_file(path), NAMES, "diffusers").file
    theirs.load_lora_adapter(adapter_tensors(renamed), prefix="transformer")
    torch.testing.assert_close(oracle_output(theirs, detached()), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("to", ["generic", "diffusers"])
def test_a_merged_file_in_another_naming_predicts_the_same_as_the_adapter(tmp_path: Path, to: Any) -> None:
    path = tmp_path / "ours.safetensors"
    _, expected = save_trained_file(lora_hunyuan_image, path, {"split_qkv": "True"})
    tensors = adapter_tensors(rename(read_adapter_file(path), NAMES, to).file)
    model = tiny_hunyuan_image(7)
    _, seen = view_denoiser([], model)
    network, weights = lora.create_network_from_weights(1.0, "file", None, [], seen, tensors, for_inference=True)
    network.merge_to([], seen, weights, torch.float32, "cpu")
    torch.testing.assert_close(model(*detached().values()), expected, **FLOAT32_DEEP)


def test_merged_dora_predicts_the_same_as_the_adapter(tmp_path: Path) -> None:
    """Compare DoRA, which diffusers does not load, with merged weights."""
    path = tmp_path / "ours.safetensors"
    _, expected = save_trained_file(lora, path, {"dora_wd": "True"})
    model = tiny_hunyuan_image(7)
    _, seen = view_denoiser([], model)
    network, weights = lora.create_network_from_weights(1.0, str(path), None, [], seen, for_inference=True)
    network.merge_to([], seen, weights, torch.float32, "cpu")
    torch.testing.assert_close(model(*detached().values()), expected, **FLOAT32_DEEP)


def test_blocks_with_adapters_compile_without_graph_breaks() -> None:
    model = tiny_hunyuan_image(7)
    _, seen = view_denoiser([], model)
    network = lora.create_network(1.0, 4, 2, None, [], seen)
    randomize(network, 3)
    network.apply_to([], seen, False, True)
    network.eval()
    expected = model(*detached().values())
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*detached().values()), expected, **FLOAT32_DEEP)


def test_lycoris_uses_ComfyUIs_layer_names() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    _, seen = view_denoiser([], tiny_hunyuan_image(7))
    network: Any = lycoris.create_network(1.0, 4, 2, None, [], seen, algo="lora", preset="attn-mlp")
    ours = lora_hunyuan_image.create_network(1.0, 4, 2, None, [], seen)
    assert set(ours.adapters) <= {module.lora_name for module in network.unet_loras}
