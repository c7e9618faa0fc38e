"""Saved Chroma adapters in the transformer of diffusers, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.flux.adapter_names import CHROMA_NAMES
from library.architectures.flux.reference import diffusers_model
from networks import lora, lora_fa, lora_flux
from networks.core.files.adapter_file import adapter_tensors, read_adapter_file
from networks.core.files.renaming import rename
from tests.parity.denoisers import save_trained
from tests.tiny.chroma import inputs, oracle_output, tiny_chroma, velocity
from tests.tolerances import FLOAT32_DEEP


@pytest.mark.parametrize(
    ("network_module", "arguments"),
    [
        (lora_flux, {"train_approximator": "True", "in_dims": "[2,0,0,0,2]"}),
        (lora_flux, {"split_qkv": "True"}),
        (lora, {"train_blocks": "single", "use_scalar": "True"}),
        (lora_fa, {}),
    ],
    ids=lambda value: value.__name__.split(".")[-1] if not isinstance(value, dict) else ",".join(value),
)
def test_diffusers_loads_our_file_and_predicts_the_same(
    network_module: Any, arguments: dict[str, str], tmp_path: Path
) -> None:
    path, values = tmp_path / "ours.safetensors", [value.detach() for value in inputs(6, 10, 4)]
    model = tiny_chroma(27)
    base, expected = save_trained(network_module, path, arguments, model, lambda: velocity(model, *values))
    assert (expected - base).abs().max() > 0.01
    theirs = diffusers_model(tiny_chroma(27))
    # The conversion of diffusers supports only width 3072.
    renamed = rename(read_adapter_file(path), CHROMA_NAMES, "diffusers").file
    theirs.load_lora_adapter(adapter_tensors(renamed), prefix="transformer")
    torch.testing.assert_close(oracle_output(theirs, *values), expected, **FLOAT32_DEEP)


def test_merged_weights_predict_the_same_as_the_adapter(tmp_path: Path) -> None:
    """Compare DoRA, which diffusers does not load, with merged weights."""
    path, values = tmp_path / "ours.safetensors", [value.detach() for value in inputs(6, 10, 5)]
    model = tiny_chroma(28)
    arguments = {"dora_wd": "True", "train_approximator": "True"}
    _, expected = save_trained(lora_flux, path, arguments, model, lambda: velocity(model, *values))
    merged = tiny_chroma(28)
    network, weights = lora_flux.create_network_from_weights(1.0, str(path), None, [], merged, for_inference=True)
    network.merge_to([], merged, weights, torch.float32, "cpu")
    torch.testing.assert_close(velocity(merged, *values), expected, **FLOAT32_DEEP)
