"""Output OFT against LyCORIS's diag-oft and the formulas of sd-scripts' networks.oft and oft_flux."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd.layers import view
from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks import lora, oft, oft_flux, oft_v2
from networks.core.changes.dropout import Dropout
from networks.core.files.adapter_file import parse_adapter
from networks.core.files.module_weights import ModuleWeights
from networks.core.kinds.oft import OrthogonalOutputs
from networks.core.registry.layouts import make_change, recognise_layout
from tests.hiding import lazily
from tests.parity.test_dit_lora import tiny_clip, tiny_unet
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.test_forms import assert_same, outputs
from tests.unit.networks.toy import toy_models

diag_oft = lazily("lycoris.modules.diag_oft")

LAYERS = {
    "linear": (lambda: nn.Linear(14, 20), (2, 5, 14)),
    "1x1": (lambda: nn.Conv2d(14, 20, 1), (2, 14, 4, 4)),
    "3x3": (lambda: nn.Conv2d(7, 20, 3, stride=2, padding=1), (2, 7, 6, 6)),
}
CASES = [(name, limit, is_scaled) for name in LAYERS for limit in (0.0, 0.02, 5.0) for is_scaled in (False, True)]


@pytest.mark.parametrize(("name", "limit", "is_scaled"), CASES)
def test_layer_merged_weight_and_gradients_match_lycoris(name: str, limit: float, is_scaled: bool) -> None:
    torch.manual_seed(6301 + CASES.index((name, limit, is_scaled)))
    layer: Any = LAYERS[name][0]().requires_grad_(False)
    theirs = diag_oft.DiagOFTModule("x", layer, 1.0, 4, 1.0, constraint=limit, rescaled=is_scaled)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    leaves = {key: tensor.detach().clone() for key, tensor in theirs.state_dict().items() if "org" not in key}
    ours = OrthogonalOutputs(layer, leaves)
    x = torch.randn(LAYERS[name][1], requires_grad=True)
    keys = [key for key, _ in ours.named_parameters()]
    y = ours.forward(x, layer, 1.0)
    grads = torch.autograd.grad(y.square().sum(), (x, *ours.parameters()))
    weight = theirs.get_merged_weight(shape=layer.weight.shape)[0]
    if isinstance(layer, nn.Conv2d):
        expected = nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    else:
        expected = nn.functional.linear(x, weight, layer.bias)
    wanted = torch.autograd.grad(expected.square().sum(), (x, *(theirs.get_parameter(key) for key in keys)))
    close = {"rtol": 1e-4, "atol": 1e-5}  # LyCORIS's inverse is float32
    torch.testing.assert_close(ours.merged(layer.weight), weight, **close)
    torch.testing.assert_close(y, expected, **close)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other.view_as(one), rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
    assert {key: t.shape for key, t in ours.stored_tensors().items()} == {key: t.shape for key, t in leaves.items()}
    again = diag_oft.DiagOFTModule("x", layer, 1.0, 4, 1.0, constraint=limit, rescaled=is_scaled)
    again.load_state_dict(dict(ours.stored_tensors()))
    torch.testing.assert_close(again.get_merged_weight(shape=layer.weight.shape)[0], weight)


def rotate_by_formula(weight: Tensor, blocks_Dbb: Tensor, alpha: float, multiplier: float) -> Tensor:
    """Compute sd-scripts' networks.oft: (m (R - 1) + 1)' W, with the norm of all Q limited to alpha * O."""
    skew = blocks_Dbb - blocks_Dbb.mT
    length = skew.norm()
    skew = skew * ((length.clamp(max=alpha * len(weight)) + 1e-8) / (length + 1e-8))
    identity = torch.eye(blocks_Dbb.shape[1], dtype=weight.dtype)
    rotation = torch.block_diag(
        *(multiplier * ((identity + q) @ torch.linalg.inv(identity - q) - identity) + identity for q in skew)
    )
    return (rotation.t() @ weight.flatten(1)).view_as(weight)


@pytest.mark.parametrize("alpha", [0.01, 3.0])
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_a_networks_oft_file_follows_its_formula(alpha: float, multiplier: float) -> None:
    torch.manual_seed(6331)
    for shape in ((12, 5), (12, 4, 3, 3)):
        weight = torch.randn(shape, dtype=torch.float64)
        leaves = {"oft_blocks": torch.randn(3, 4, 4, dtype=torch.float64) * 0.3, "alpha": torch.tensor(alpha)}
        expected = rotate_by_formula(weight, leaves["oft_blocks"], float(leaves["alpha"]), multiplier)
        actual = ModuleWeights("oft_unet_x", leaves, {}).merged(weight, multiplier, torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)  # it adds 1e-8 to the norm
        assert (actual - weight).norm() > 0.05


def test_a_networks_oft_flux_file_rotates_q_k_v_and_the_mlp_separately() -> None:
    torch.manual_seed(6341)
    weight = torch.randn(3 * 4 + 8, 6, dtype=torch.float64)
    pieces = {f"oft_blocks.{i}": torch.randn(2, n, n, dtype=torch.float64) * 0.2 for i, n in enumerate((2, 2, 2, 4))}
    leaves = {**pieces, "alpha": torch.tensor(0.05)}
    assert recognise_layout(leaves).network_module == "networks.oft"
    rows = torch.split(weight, [4, 4, 4, 8])
    expected = torch.cat(
        [rotate_by_formula(part, blocks, 0.05, 1.0) for part, blocks in zip(rows, pieces.values(), strict=True)]
    )
    torch.testing.assert_close(make_change(leaves).merged(weight), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("is_deviation", [False, True])
def test_full_matrices_of_early_lycoris_are_merged(is_deviation: bool) -> None:
    torch.manual_seed(6351)
    weight, identity = torch.randn(12, 5, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    deviation = torch.randn(3, 4, 4, dtype=torch.float64) * 0.1
    change = make_change({"oft_diag": deviation if is_deviation else deviation + identity})
    expected = torch.einsum("knm,knp->kmp", deviation + identity, weight.view(3, 4, 5)).reshape(12, 5)
    torch.testing.assert_close(change.merged(weight), expected, **FLOAT64)
    torch.testing.assert_close(change.merged(weight, 0.3), weight + 0.3 * (expected - weight), **FLOAT64)


def write_old_file(path: Path, seed: int, prefix: str, pieces: bool) -> str:
    """Write a toy model's file as sd-scripts' networks.oft or oft_flux does."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    leaf = "oft_blocks.0" if pieces else "oft_blocks"
    for module, width in (("mid_attention_proj_in", 8), ("mid_attention_to_q", 6), ("up_0_resnet_conv1", 6)):
        if not (pieces and "conv" in module):
            tensors[f"{prefix}_{module}.{leaf}"] = torch.randn(2, width // 2, width // 2) * 0.3
            tensors[f"{prefix}_{module}.alpha"] = torch.tensor(0.05)
    save_safetensors(path, tensors, {})
    return str(path)


@pytest.mark.parametrize(("network_module", "pieces"), [(oft, False), (oft_flux, True)])
def test_files_are_read_merged_and_trained_further(tmp_path: Path, network_module: Any, pieces: bool) -> None:
    text, unet = toy_models(6361)
    alone = outputs(text, unet, 6362)
    path = write_old_file(tmp_path / "x.safetensors", 6363, "lora_unet", pieces)
    network, weights = network_module.create_network_from_weights(1.0, path, None, text, unet)
    network.apply_to(text, unet, False, True)
    network.load_weights(path)
    learned = outputs(text, unet, 6362)
    assert (learned[1] - alone[1]).abs().max() > 0.05
    learned[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    count, _, largest = network.apply_max_norm_regularization(0.1, "cpu")
    assert count > 0 and largest <= 0.1001
    network.load_weights(path)
    network.save_weights(str(tmp_path / "again.safetensors"), None, {})
    saved = load_state_dict(tmp_path / "again.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[key], weights[key]) for key in saved)
    network.remove()
    for reading in (network_module, lora):
        text, unet = toy_models(6361)
        second, weights = reading.create_network_from_weights(1.0, path, None, text, unet, for_inference=True)
        second.merge_to(text, unet, weights, torch.float32, "cpu")
        assert_same(outputs(text, unet, 6362), learned, **FLOAT32_SAME_MATH)


def test_names_of_networks_oft_resolve_to_the_same_modules(tmp_path: Path) -> None:
    torch.manual_seed(6365)
    seen = view([tiny_clip(6366, torch.float32)], tiny_unet(6367, torch.float32))
    path = str(tmp_path / "x.safetensors")
    name = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    blocks = torch.randn(4, 4, 4)
    save_safetensors(path, {f"oft_unet_{name}.oft_blocks": blocks, f"oft_unet_{name}.alpha": torch.tensor(1e-3)}, {})
    network, weights = oft.create_network_from_weights(1.0, path, None, *seen)
    assert list(network.adapters) == [f"lora_unet_{name}"]
    network.load_weights(path)
    assert torch.equal(weights[f"lora_unet_{name}.oft_blocks"], blocks)
    assert torch.equal(network.adapters[f"lora_unet_{name}"].change.stored_tensors()["oft_blocks"], blocks)


def test_errors_for_other_kinds_suggest_an_alternative(tmp_path: Path) -> None:
    text, unet = toy_models(6371)
    path = write_old_file(tmp_path / "x.safetensors", 6372, "lora_unet", False)
    with pytest.raises(ValueError, match=r"\*\.oft_blocks .*Use --network_module networks.oft$"):
        oft_v2.create_network_from_weights(1.0, path, None, text, unet)
    for argument in ("use_scalar", "dora_wd", "split_qkv", "rslora"):
        with pytest.raises(ValueError, match=f"{argument} does not work with this --network_module: "):
            oft.create_network_from_weights(1.0, path, None, text, unet, **{argument: "True"})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"oft_blocks": (2, 2, 4, 4)}, "[2, 2, 4, 4]: BOFT of LyCORIS, which is not computed here; LyCORIS merges it"),
        ({"oft_blocks": (2, 4, 3)}, "of the shape [2, 4, 3]; it needs (blocks, b, b)"),
        ({"oft_blocks.1": (2, 4, 4)}, "without all pieces before it"),
        ({"rescale": (8, 1)}, "without oft_blocks; the file is incomplete"),
        ({"oft_blocks": (2, 4, 4), "rescale": (9, 1)}, "it needs one number for each output"),
    ],
)
def test_mismatched_tensors_are_named(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    named = {f"lora_unet_x.{leaf}": torch.ones(shape) for leaf, shape in tensors.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_adapter(named, {}, "cat.safetensors")


@torch.no_grad()
def test_dropout_drops_blocks_of_outputs() -> None:
    torch.manual_seed(6381)
    layer = nn.Linear(12, 12, bias=False)
    layer.weight.copy_(torch.eye(12))
    change = OrthogonalOutputs(layer, {"oft_blocks": torch.randn(3, 4, 4)}, Dropout(neuron=0.5, module=0.1))
    x = torch.randn(1, 12)
    full = change.eval().forward(x, layer, 1.0).view(3, 4)
    seen = set()
    for _ in range(200):
        dropped = change.train().forward(x, layer, 1.0).view(3, 4)
        left = [torch.equal(part, alone) for part, alone in zip(dropped, x.view(3, 4), strict=True)]
        assert all(is_left or torch.allclose(a, b) for is_left, a, b in zip(left, dropped, full, strict=True))
        seen.add(tuple(left))
    assert len(seen) == 8
