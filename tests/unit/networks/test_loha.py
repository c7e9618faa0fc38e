"""networks.loha in a complete network: names, files, loading, memory, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest

from library.checkpoints.files import load_state_dict, save_safetensors
from networks import loha
from networks.core.network.network import AdapterNetwork
from tests.unit.networks.test_forms import CONV, LINEAR, perturb
from tests.unit.networks.toy import toy_models

FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "conv": {"conv_dim": "2"},
    "core": {"conv_dim": "2", "use_tucker": "True"},
    "everything": {"conv_dim": "2", "use_tucker": "1", "use_scalar": "1", "train_norm": "1", "dora_wd": "1"},
    "per output": {"conv_dim": "2", "dora_wd": "1", "wd_on_output": "1"},
}


def trained(seed: int, **args: str) -> tuple[AdapterNetwork, Any, Any]:
    """Return an installed network with random weights, and its models."""
    text, unet = toy_models(seed)
    network = loha.create_network(1.0, 3, 2.0, None, text, unet, **args)
    perturb(network, seed + 1)
    network.apply_to(text, unet)
    return network, text, unet


def test_saved_keys_and_shapes() -> None:
    saved = trained(2001, conv_dim="2", use_tucker="True")[0].adapters
    assert {leaf: list(t.shape) for leaf, t in saved[LINEAR].change.stored_tensors().items()} == {
        "alpha": [], "hada_w1_a": [6, 3], "hada_w1_b": [3, 8], "hada_w2_a": [6, 3], "hada_w2_b": [3, 8],
    }  # fmt: skip
    assert {leaf: list(t.shape) for leaf, t in saved[CONV].change.stored_tensors().items()} == {
        "alpha": [], "hada_w1_a": [2, 6], "hada_w1_b": [2, 6], "hada_w2_a": [2, 6], "hada_w2_b": [2, 6],
        "hada_t1": [2, 2, 3, 3], "hada_t2": [2, 2, 3, 3],
    }  # fmt: skip


def test_a_file_that_lacks_a_factor_is_named(tmp_path: Path) -> None:
    network, text, unet = trained(2081)
    tensors = {key: t.contiguous() for key, t in network.state_dict().items() if key != f"{LINEAR}.hada_w2_b"}
    save_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(ValueError, match=re.escape(f"{LINEAR} has") + ".*the file is incomplete"):
        loha.create_network(1.0, 3, 2.0, None, text, unet).load_weights(str(tmp_path / "x.safetensors"))
    assert load_state_dict(tmp_path / "x.safetensors").keys() == tensors.keys()
