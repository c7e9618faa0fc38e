"""Saved Lumina Image 2.0 adapters in diffusers' own transformer and names, on the same weights."""

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
from tests.parity.test_lumina_model import inputs, oracle_output
from tests.tiny.lumina import tiny_lumina
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize

DOORS = {"lora_lumina": lora_lumina, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}
EMBEDDERS = {"embedder_dims": "[2,2,2]"}


def trained_file(door: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; gives the prediction without and with it."""
    model = tiny_lumina(7)
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    return save_trained(door, path, arguments, model, lambda: model(*values))


@pytest.mark.parametrize(
    ("door", "arguments"),
    [
        ("lora_lumina", EMBEDDERS),
        ("lora_lumina", {"split_qkv": "True"}),
        ("lora", {"train_blocks": "refiners", "use_scalar": "True"}),
        ("lora_fa", {"split_qkv": "True", **EMBEDDERS}),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_file_and_predicts_the_same(door: str, arguments: dict[str, str], tmp_path: Path) -> None:
    from diffusers import Lumina2Pipeline

    path = tmp_path / "ours.safetensors"
    base, expected = trained_file(DOORS[door], path, arguments)
    assert (expected - base).abs().max() > 0.01
    theirs = diffusers_model(tiny_lumina(7))
    renamed = rename(read_adapter_file(path), NAMES, "diffusers").file  # diffusers' own renaming knows 2304 alone
    Lumina2Pipeline.load_lora_into_transformer(Lumina2Pipeline.lora_state_dict(adapter_tensors(renamed)), theirs)
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    torch.testing.assert_close(oracle_output(theirs, *values), expected, **FLOAT32_DEEP)


def test_our_diffusers_names_are_what_diffusers_makes_of_our_file() -> None:
    """At full size: every module of the blocks, key by key. It refuses alphas and the final layer."""
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


def test_merged_weights_predict_what_the_adapter_did(tmp_path: Path) -> None:
    """DoRA, which diffusers does not load, against weights that are added up."""
    path = tmp_path / "ours.safetensors"
    _, expected = trained_file(lora_lumina, path, {"dora_wd": "True", "split_qkv": "True", **EMBEDDERS})
    model = tiny_lumina(7)
    network, weights = lora_lumina.create_network_from_weights(1.0, str(path), None, [], model, for_inference=True)
    network.merge_to([], model, weights, torch.float32, "cpu")
    values = [value.detach() for value in inputs(6, 10, (5, 2))]
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


def test_blocks_with_adapters_compile_without_a_break_in_the_graph() -> None:
    torch.compiler.reset()  # what other tests compiled counts toward its limit
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


def test_lycoris_finds_the_blocks_by_their_class_names() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    model = tiny_lumina(7)
    network: Any = lycoris.create_network(1.0, 4, 2, None, [], model, algo="lora", preset="attn-mlp")
    ours = lora_lumina.create_network(1.0, 4, 2, None, [], model)
    assert {module.lora_name for module in network.unet_loras} == set(ours.adapters)
