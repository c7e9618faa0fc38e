"""Saved FLUX.1 adapters in the transformer and pipeline format of diffusers, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.flux.adapter_names import NAMES
from library.architectures.flux.model import PATCH
from library.architectures.flux.reference import diffusers_model
from library.architectures.specs import list_specs
from library.models.patches import patchify
from networks import dylora, lora, lora_fa, lora_flux
from networks.core.files.adapter_file import adapter_tensors, parse_adapter, read_adapter_file
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import rename
from tests.contracts.test_lora_keys_flux1 import FACTS
from tests.parity.denoisers import save_trained
from tests.tiny.flux import inputs, oracle_output, tiny_flux
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize
from tools.adapters import spec_for_file

DOORS = {"lora_flux": lora_flux, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}


def save_trained_file(network_module: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; return the predictions without and with it."""
    model = tiny_flux(7)
    values = [value.detach() for value in inputs(6, 10)]
    return save_trained(network_module, path, arguments, model, lambda: patchify(model(*values), PATCH))


@pytest.mark.parametrize(
    ("network_module", "arguments"),
    [
        ("lora_flux", {}),
        ("lora_flux", {"split_qkv": "True"}),
        ("lora", {"train_blocks": "single", "use_scalar": "True"}),
        ("lora_fa", {"split_qkv": "True"}),
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
    theirs = diffusers_model(tiny_flux(7))
    # The conversion of diffusers supports only width 3072.
    renamed = rename(read_adapter_file(path), NAMES, "diffusers").file
    theirs.load_lora_adapter(adapter_tensors(renamed), prefix="transformer")
    values = [value.detach() for value in inputs(6, 10)]
    torch.testing.assert_close(oracle_output(theirs, *values), expected, **FLOAT32_DEEP)


def test_diffusers_converts_our_file_to_our_diffusers_names(tmp_path: Path) -> None:
    """Compare every module at full size and rank 1, key by key and value by value."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for key, shape in FACTS["default"].items():
        if key.startswith("lora_unet"):
            tensors[key] = torch.full((), 2.0) if not shape else torch.randn(shape, generator=generator)
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    ours = adapter_tensors(rename(parse_adapter(tensors, {}, "file"), NAMES, "diffusers").file)
    assert ours.keys() == {key for key in theirs if key.startswith("transformer.")}
    for path in {key.rpartition(".lora_")[0] for key in ours}:
        product = ours[f"{path}.lora_B.weight"][:64] @ ours[f"{path}.lora_A.weight"]
        their_product = theirs[f"{path}.lora_B.weight"][:64] @ theirs[f"{path}.lora_A.weight"]
        torch.testing.assert_close(product, their_product, **FLOAT32_DEEP)


def test_merged_weights_predict_the_same_as_the_adapter(tmp_path: Path) -> None:
    """Compare DoRA and adapted embedders, which diffusers does not load, with merged weights."""
    path = tmp_path / "ours.safetensors"
    _, expected = save_trained_file(lora_flux, path, {"dora_wd": "True", "in_dims": "[2,2,2,2,2]", "split_qkv": "True"})
    model = tiny_flux(7)
    network, weights = lora_flux.create_network_from_weights(1.0, str(path), None, [], model, for_inference=True)
    network.merge_to([], model, weights, torch.float32, "cpu")
    values = [value.detach() for value in inputs(6, 10)]
    torch.testing.assert_close(patchify(model(*values), PATCH), expected, **FLOAT32_DEEP)


def test_blocks_with_adapters_compile_without_graph_breaks() -> None:
    model = tiny_flux(7)
    network = lora_flux.create_network(1.0, 4, 2, None, [], model)
    randomize(network, 3)
    network.apply_to([], model, False, True)
    network.eval()
    values = [value.detach() for value in inputs(6, 10)]
    expected = model(*values)
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


def test_lycoris_finds_blocks_by_class_name() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    model = tiny_flux(7)
    network: Any = lycoris.create_network(1.0, 4, 2, None, [], model, algo="lora", preset="attn-mlp")
    ours = lora_flux.create_network(1.0, 4, 2, None, [], model)
    assert {module.lora_name for module in network.unet_loras} == set(ours.adapters)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_files_convert_as_in_diffusers(prefix: str) -> None:
    """Double blocks and outputs of single blocks are read; partial q, k, v layers of single blocks are rejected."""
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(3)
    sizes = {"qkv_lora1": (48, 16), "proj_lora1": (16, 16), "qkv_lora2": (48, 16), "proj_lora2": (16, 16)}
    layers = {f"double_blocks.{n}.processor.{name}": size for n in (0, 18) for name, size in sizes.items()}
    layers["single_blocks.37.processor.proj_lora"] = (16, 80)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs_) in layers.items():
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(4, inputs_, generator=generator)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(outputs, 4, generator=generator)
    file = add_model(parse_adapter(tensors, {}, "xlabs.safetensors"), [spec.names for spec in list_specs()])
    assert spec_for_file(file, "xlabs.safetensors").name == "flux"
    ours = rename(file, NAMES, "kohya").file.modules
    theirs = rename(parse_adapter(_convert_xlabs_flux_lora_to_diffusers(dict(tensors)), {}, ""), NAMES, "kohya")
    assert ours.keys() == theirs.file.modules.keys() and len(ours) == len(layers)
    for name, module in theirs.file.modules.items():
        assert torch.equal(ours[name].weight(), module.weight())
    more = {f"{prefix}single_blocks.0.processor.qkv_lora.{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
    file = add_model(parse_adapter({**tensors, **more}, {}, "xlabs.safetensors"), [NAMES])
    with pytest.raises(ValueError, match=r"no place for .*single_blocks\.0\.processor\.qkv_lora"):
        rename(file, NAMES, "kohya")
