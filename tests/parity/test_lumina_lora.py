"""Saved Lumina Image 2.0 adapters in the transformer and names of diffusers, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.lumina.adapter_names import NAMES
from library.architectures.lumina.reference import diffusers_model
from networks import dylora, lora, lora_fa, lora_lumina
from networks.core.files.adapter_file import adapter_tensors, parse_adapter, read_adapter_file
from networks.core.files.renaming import rename
from tests.contracts.test_lora_keys_lumina2 import LORA
from tests.parity.denoisers import save_trained
from tests.tiny.lumina import inputs, oracle_output, tiny_lumina
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize

DOORS = {"lora_lumina": lora_lumina, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}
EMBEDDERS = {"embedder_dims": "[2,2,2]"}


def save_trained_file(network_module: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; return the predictions without and with it."""
    model = tiny_lumina(7)
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    return save_trained(network_module, path, arguments, model, lambda: model(*values))


@pytest.mark.parametrize(
    ("network_module", "arguments"),
    [
        ("lora_lumina", EMBEDDERS),
        ("lora_lumina", {"split_qkv": "True"}),
        ("lora", {"train_blocks": "refiners", "use_scalar": "True"}),
        ("lora_fa", {"split_qkv": "True", **EMBEDDERS}),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_file_and_predicts_the_same(
    network_module: str, arguments: dict[str, str], tmp_path: Path
) -> None:
    from diffusers import Lumina2Pipeline

    path = tmp_path / "ours.safetensors"
    base, expected = save_trained_file(DOORS[network_module], path, arguments)
    assert (expected - base).abs().max() > 0.01
    theirs = diffusers_model(tiny_lumina(7))
    # The conversion of diffusers supports only width 2304.
    renamed = rename(read_adapter_file(path), NAMES, "diffusers").file
    Lumina2Pipeline.load_lora_into_transformer(Lumina2Pipeline.lora_state_dict(adapter_tensors(renamed)), theirs)
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    torch.testing.assert_close(oracle_output(theirs, *values), expected, **FLOAT32_DEEP)


def test_diffusers_converts_our_file_to_our_diffusers_names() -> None:
    """Compare every block module at full size, key by key. diffusers rejects alphas and the final layer."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lumina2_lora_to_diffusers

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for key, shape in LORA["default"].items():
        if key.startswith("lora_unet") and "final_layer" not in key:
            tensors[key] = torch.full((), 2.0) if not shape else torch.randn(shape, generator=generator)
    file = parse_adapter(tensors, {}, "file")
    generic = adapter_tensors(rename(file, NAMES, "generic").file)
    theirs = _convert_non_diffusers_lumina2_lora_to_diffusers(dict(generic))
    ours = adapter_tensors(rename(file, NAMES, "diffusers").file)
    assert ours.keys() == theirs.keys()
    for path in {key.rpartition(".lora_")[0] for key in ours}:
        product = ours[f"{path}.lora_B.weight"][:64] @ ours[f"{path}.lora_A.weight"]
        their_product = theirs[f"{path}.lora_B.weight"][:64] @ theirs[f"{path}.lora_A.weight"]
        torch.testing.assert_close(product, their_product, **FLOAT32_DEEP)


def test_merged_weights_predict_the_same_as_the_adapter(tmp_path: Path) -> None:
    """Compare DoRA, which diffusers does not load, with merged weights."""
    path = tmp_path / "ours.safetensors"
    _, expected = save_trained_file(lora_lumina, path, {"dora_wd": "True", "split_qkv": "True", **EMBEDDERS})
    model = tiny_lumina(7)
    network, weights = lora_lumina.create_network_from_weights(1.0, str(path), None, [], model, for_inference=True)
    network.merge_to([], model, weights, torch.float32, "cpu")
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


def test_blocks_with_adapters_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_lumina(7)
    network = lora_lumina.create_network(1.0, 4, 2, None, [], model)
    randomize(network, 3)
    network.apply_to([], model, False, True)
    network.eval()
    values = [value.detach() for value in inputs(6, 10)]
    expected = model(*values)
    for block in (*model.context_refiner, *model.noise_refiner, *model.layers):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


def test_lycoris_finds_blocks_by_class_name() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    model = tiny_lumina(7)
    network: Any = lycoris.create_network(1.0, 4, 2, None, [], model, algo="lora", preset="attn-mlp")
    ours = lora_lumina.create_network(1.0, 4, 2, None, [], model)
    assert {module.lora_name for module in network.unet_loras} == set(ours.adapters)
