"""Saved Anima adapters in the loader and models of diffusers, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.anima.adapter_names import NAMES
from library.architectures.anima.model import Anima
from library.architectures.anima.reference import diffusers_models
from library.checkpoints.adapter_names import FileNaming
from networks import dylora, lora, lora_anima, lora_fa
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.tiny.anima import inputs, oracle_of, tiny_anima
from tests.tolerances import FLOAT32_DEEP

DOORS = {"lora_anima": lora_anima, "lora": lora, "lora_fa": lora_fa, "dylora": dylora}


def save_trained_file(network_module: Any, path: Path, arguments: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Save an adapter with random weights; return the predictions without and with it."""
    model = tiny_anima(7)
    values = [value.detach() for value in inputs(6, 10)]
    return save_trained(network_module, path, arguments, model, lambda: model(*values))


def predict_by_diffusers(tensors: dict[str, Tensor], model: Anima | None = None) -> Tensor:
    """Return the prediction of diffusers' models after its Anima reader has loaded the file."""
    from diffusers.loaders.lora_pipeline import AnimaLoraLoaderMixin

    reader: Any = AnimaLoraLoaderMixin
    transformer, conditioner = diffusers_models(model or tiny_anima(7))
    state = reader.lora_state_dict(tensors)
    assert all("lora" in key for key in state)
    for part, theirs in (("transformer", transformer), ("text_conditioner", conditioner)):
        part_state = {key: tensor for key, tensor in state.items() if key.startswith(f"{part}.")}
        if part_state:
            theirs.load_lora_adapter(part_state, prefix=part)
    return oracle_of(transformer, conditioner)(*(value.detach() for value in inputs(6, 10)))


@pytest.mark.parametrize("naming", ["generic", "diffusers"])
@pytest.mark.parametrize(
    ("network_module", "arguments"),
    [
        ("lora_anima", {"train_llm_adapter": "True"}),
        ("lora", {"include_patterns": ".*", "use_scalar": "True"}),
        ("lora_fa", {}),
        ("dylora", {"unit": "2"}),
    ],
    ids=str,
)
def test_diffusers_loads_our_converted_file_and_predicts_the_same(
    network_module: str, arguments: dict[str, str], naming: FileNaming, tmp_path: Path
) -> None:
    path = tmp_path / "ours.safetensors"
    base, expected = save_trained_file(DOORS[network_module], path, arguments)
    assert (expected - base).abs().max() > 0.01
    renamed = adapter_tensors(rename(read_adapter_file(path), NAMES, naming).file)
    torch.testing.assert_close(predict_by_diffusers(renamed), expected, **FLOAT32_DEEP)


def test_merged_weights_predict_the_same_as_the_adapter(tmp_path: Path) -> None:
    """Compare DoRA, which diffusers does not load, with merged weights."""
    path = tmp_path / "ours.safetensors"
    arguments = {"dora_wd": "True", "train_llm_adapter": "True", "include_patterns": "['.*']"}
    _, expected = save_trained_file(lora_anima, path, arguments)
    model = tiny_anima(7)
    network, weights = lora_anima.create_network_from_weights(1.0, str(path), None, [], model, for_inference=True)
    network.merge_to([], model, weights, torch.float32, "cpu")
    values = [value.detach() for value in inputs(6, 10)]
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


@pytest.mark.parametrize("naming", ["generic", "diffusers"])
def test_training_continues_from_files_with_other_programs_names(naming: FileNaming, tmp_path: Path) -> None:
    path, other = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    _, expected = save_trained_file(lora_anima, path, {"train_llm_adapter": "True"})
    save_adapter_file(other, rename(read_adapter_file(path), NAMES, naming).file)
    model = tiny_anima(7)
    network, weights = lora_anima.create_network_from_weights(1.0, str(other), None, [], model)
    network.apply_to([], model, False, True)
    network.load_state_dict(weights, strict=False)
    network.eval()
    values = [value.detach() for value in inputs(6, 10)]
    torch.testing.assert_close(model(*values), expected, **FLOAT32_DEEP)


def test_lycoris_finds_the_blocks_and_uses_our_layer_names() -> None:
    lycoris = pytest.importorskip("lycoris.kohya")
    model = tiny_anima(7)
    theirs: Any = lycoris.create_network(1.0, 4, 2, None, [], model, algo="lora", preset="full")
    ours = lora_anima.create_network(1.0, 4, 2, None, [], model, include_patterns=".*")
    assert {module.lora_name for module in theirs.unet_loras} >= set(ours.adapters)
