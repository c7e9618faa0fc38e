"""Common behaviour of all kinds in a network: initial state, files, loading, norms, dropout, refusals."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from library.checkpoints.files import load_state_dict
from networks import boft, loha, lokr, lora, oft_v2
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.test_forms import CONV, FORMS, LINEAR, assert_same, outputs, perturb
from tests.unit.networks.toy import toy_models

LORAPLUS = "loraplus_lr_ratio"


@dataclass(frozen=True)
class Case:
    """A kind, the forms of its modules, and where it differs from the others."""

    network_module: ModuleType
    rank: int
    forms: dict[str, dict[str, str]]
    scaled: str  # the leaf that a trained scalar is folded into
    fast: str = ""  # the factor that LoRA+ trains faster; "" if it is refused
    refused: tuple[str, ...] = ("split_qkv",)
    own: dict[str, str] = field(default_factory=dict)  # arguments that go with those of every kind


EVERYTHING = {"conv_dim": "1", "use_tucker": "1", "use_scalar": "1", "train_norm": "1", "dora_wd": "1"}
WITH_DORA = {"dora_wd": "1", "use_tucker": "1", "rank_dropout": "0.1", LORAPLUS: "4", "conv_alpha": "2"}
CASES: dict[str, Case] = {
    "lora": Case(lora, 4, FORMS, scaled="lora_up.weight", fast="lora_up.weight", refused=(), own=WITH_DORA),
    "loha": Case(
        loha, 3,
        {
            "plain": {},
            "conv": {"conv_dim": "2"},
            "core": {"conv_dim": "2", "use_tucker": "True"},
            "everything": EVERYTHING,
            "per output": {**EVERYTHING, "wd_on_output": "1"},
        },
        scaled="hada_w2_a", fast="hada_w2_a", own=WITH_DORA,
    ),
    "lokr": Case(
        lokr, 1,
        {
            "plain": {"factor": "1"},
            "whole": {"full_matrix": "True", "factor": "2", "conv_dim": "2"},
            "mixed": {"conv_dim": "2"},  # at rank 1 products where a side is longer than 2
            "both": {"factor": "3", "decompose_both": "True"},
            "core": {"conv_dim": "1", "use_tucker": "True", "factor": "1"},
            "everything": {**EVERYTHING, "factor": "2"},
            "per output": {**EVERYTHING, "factor": "2", "wd_on_output": "1"},
        },
        scaled="lokr_w1", fast="lokr_w1", own={**WITH_DORA, "factor": "2", "decompose_both": "1"},
    ),
    "oft_v2": Case(
        oft_v2, 2,
        {
            "plain": {},
            "conv": {"enable_conv": "y"},
            "shared": {"oft_block_share": "1", "conv_dim": "3"},
            "limited": {"coft": "True", "coft_eps": "0.6"},
            "everything": {"enable_conv": "1", "use_scalar": "1", "train_norm": "1", "oft_block_size": "3"},
        },
        scaled="oft_R.weight",
        refused=("split_qkv", "dora_wd", "use_tucker", "rank_dropout", "rslora", "tlora", LORAPLUS),
        own={"coft": "1", "coft_eps": "0.5", "enable_conv": "1"},
    ),
    "boft": Case(
        boft, 2,
        {
            "plain": {},
            "conv": {"enable_conv": "y"},
            "several": {"boft_n_butterfly_factor": "2", "include_patterns": ".*to_q"},
            "counted": {"boft_block_num": "1"},
            "everything": {"enable_conv": "1", "use_scalar": "1", "train_norm": "1", "boft_block_size": "3"},
        },
        scaled="boft_R",
        refused=("split_qkv", "dora_wd", "use_tucker", "rank_dropout", "rslora", "tlora", LORAPLUS),
        own={"enable_conv": "1"},
    ),
}  # fmt: skip
PAIRS = [(kind, form) for kind, case in CASES.items() for form in case.forms]
SEEDS = {pair: 7000 + 10 * number for number, pair in enumerate(PAIRS)}


def make_network(kind: str, form: str, text: nn.Module, unet: nn.Module, **more: str) -> AdapterNetwork:
    """Return a fresh network that is not installed."""
    case = CASES[kind]
    network = case.network_module.create_network(1.0, case.rank, 2.0, None, text, unet, **case.forms[form], **more)
    assert isinstance(network, AdapterNetwork)
    return network


def trained(kind: str, form: str, seed: int, **more: str) -> tuple[AdapterNetwork, Any, Any]:
    """Return an installed network with random weights, and its models."""
    text, unet = toy_models(seed)
    network = make_network(kind, form, text, unet, **more)
    perturb(network, seed + 1)
    network.apply_to(text, unet)
    return network, text, unet


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_an_untrained_network_changes_nothing(kind: str, form: str) -> None:
    text, unet = toy_models(SEEDS[kind, form])
    before = outputs(text, unet, 2012)
    make_network(kind, form, text, unet).apply_to(text, unet)
    assert_same(outputs(text, unet, 2012), before)


@pytest.mark.parametrize("way", ["settings", "file", "merged", "merged by networks.lora"])
@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_a_file_computes_the_same_however_it_is_loaded(tmp_path: Path, kind: str, form: str, way: str) -> None:
    network, text, unet = trained(kind, form, SEEDS[kind, form])
    expected = outputs(text, unet, 2022)
    path = str(tmp_path / "x.safetensors")
    network.save_weights(path, None, {})
    network.remove()
    assert (outputs(text, unet, 2022)[1] - expected[1]).abs().max() > 0.01
    network_module: Any = CASES[kind].network_module
    if way == "settings":
        second = make_network(kind, form, text, unet)
        second.apply_to(text, unet)
        second.load_weights(path)
    elif way == "file":
        second, _ = network_module.create_network_from_weights(1.0, path, None, text, unet)
        second.apply_to(text, unet)
        second.load_weights(path)
    else:
        network_module = lora if way.endswith("lora") else network_module
        second, weights = network_module.create_network_from_weights(1.0, path, None, text, unet, for_inference=True)
        second.merge_to(text, unet, weights, torch.float32, "cpu")
    assert_same(outputs(text, unet, 2022), expected)


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_a_multiplier_scales_the_change_of_every_weight(kind: str, form: str) -> None:
    network, text, unet = trained(kind, form, SEEDS[kind, form] + 3)
    network.set_multiplier(0.4)
    expected = outputs(text, unet, 2032)
    merged = {name: adapter.merged() for name, adapter in network.adapters.items()}
    network.remove()
    for name, adapter in network.adapters.items():
        for parameter, value in merged[name].items():
            getattr(adapter.target.module, parameter).data = value.detach()
    assert_same(outputs(text, unet, 2032), expected)


@pytest.mark.parametrize(("kind", "form"), PAIRS)
def test_norms_are_limited(kind: str, form: str) -> None:
    network = trained(kind, form, SEEDS[kind, form] + 5)[0]
    changes: list[Any] = [adapter.change for adapter in network.adapters.values() if adapter.target.kind != "norm"]
    if "oft" not in kind:
        for change in changes:
            torch.testing.assert_close(change.norm(), change.weight().norm(), **FLOAT32_SAME_MATH)
    limit = 0.5 * max(change.norm().item() for change in changes)
    count, mean, maximum = network.apply_max_norm_regularization(limit, "cpu")
    assert count > 0 and mean <= maximum * 1.000001 <= limit * 1.0001  # a mean of equal numbers is rounded
    assert max(change.norm().item() for change in changes) == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_a_trained_scalar_is_folded_into_the_file(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    network, _, _ = trained(kind, "plain", 7501, use_scalar="True")
    change: Any = network.adapters[LINEAR].change
    change.scalar.data.fill_(-0.25)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    tensors = load_state_dict(tmp_path / "x.safetensors")
    assert torch.equal(tensors[f"{LINEAR}.{case.scaled}"], -0.25 * change.get_parameter(case.scaled))
    assert not any("scalar" in key for key in tensors)


@pytest.mark.parametrize("kind", CASES)
def test_a_trained_scalar_starts_at_zero_and_gets_a_gradient(kind: str) -> None:
    text, unet = toy_models(7511)
    network = make_network(kind, "plain", text, unet, use_scalar="True")
    network.apply_to(text, unet)
    sum(out.square().sum() for out in outputs(text, unet, 7512)).backward()  # type: ignore[union-attr]
    change: Any = network.adapters[LINEAR].change
    assert change.scalar.item() == 0 and change.scalar.grad.abs().item() > 0
    assert change.get_parameter(CASES[kind].scaled).abs().max().item() > 0


@pytest.mark.parametrize("kind", CASES)
def test_loraplus_raises_the_rate_of_one_factor_or_is_refused(kind: str) -> None:
    fast = CASES[kind].fast
    if not fast:
        with pytest.raises(ValueError, match=f"{LORAPLUS} does not work with this --network_module"):
            trained(kind, "everything", 7521, **{LORAPLUS: "4"})
        return
    network = trained(kind, "everything", 7521, **{LORAPLUS: "4"})[0]
    groups, names = network.prepare_optimizer_params(1e-3, 1e-4, 1e-3)
    plus = {p for g, name in zip(groups, names, strict=True) if name.endswith("plus") for p in g["params"]}
    assert plus == {p for name, p in network.named_parameters() if name.endswith(fast)}


@pytest.mark.parametrize("kind", CASES)
def test_incompatible_arguments_are_an_error_that_says_why(kind: str) -> None:
    text, unet = toy_models(7531)
    for name in CASES[kind].refused:
        with pytest.raises(ValueError, match=rf"--network_args {name} does not work with this --network_module: \w+"):
            make_network(kind, "plain", text, unet, **{name: "0.5" if name in ("rank_dropout", LORAPLUS) else "True"})


@pytest.mark.parametrize("kind", sorted(CASES.keys() - {"lora"}))
def test_a_file_is_trained_further_only_with_its_own_network_module(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "x.safetensors")
    network, text, unet = trained(kind, "plain", 7541)
    network.save_weights(path, None, {})
    network.remove()
    hint = rf"has keys such as \*\..*Use --network_module {re.escape(CASES[kind].network_module.__name__)}"
    for other in {lora, *(case.network_module for case in CASES.values())} - {CASES[kind].network_module}:
        network_module: Any = other
        with pytest.raises(ValueError, match=hint):
            network_module.create_network_from_weights(1.0, path, None, text, unet)
        with pytest.raises(ValueError, match=hint):
            network_module.create_network(1.0, 3, 2.0, None, text, unet).load_weights(path)


@pytest.mark.parametrize("kind", CASES)
def test_ranks_and_rates_can_be_set_for_single_modules(kind: str) -> None:
    """Cover network_reg_dims, network_reg_lrs and block_dims; for some kinds the rank is a block size."""
    other = "3" if "oft" in kind else "2"
    arguments = {"network_reg_dims": f"mid_attention_proj_in={other}", "network_reg_lrs": "mid_attention=0.5"}
    network = trained(kind, "plain", 7551, **arguments)[0]
    allotted = {member.adapter.target.name: member.settings for member in network.members}
    assert allotted["lora_unet_mid_attention_proj_in"].rank == int(other)
    assert {a.rank for name, a in allotted.items() if not name.endswith("proj_in")} == {CASES[kind].rank}
    assert {a.lr for name, a in allotted.items() if "mid_attention" in name} == {0.5}
    network = trained(kind, "plain", 7561, block_dims=f"0,{other},0,0")[0]
    assert {m.adapter.target.path.split(".")[0] for m in network.members if m.text_encoder is None} == {"down"}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("drop", ["module_dropout", "neuron_dropout"])
def test_dropout_acts_only_in_training(kind: str, drop: str) -> None:
    network, text, unet = trained(kind, "plain", 7571, **{drop: "0.5"})
    network.eval()
    first, repeated = outputs(text, unet, 7572), outputs(text, unet, 7572)
    assert all(torch.equal(left, right) for left, right in zip(first, repeated, strict=True))
    network.train()
    torch.manual_seed(7573)
    drawn = torch.stack([outputs(text, unet, 7572)[1] for _ in range(8)])
    assert (drawn - first[1]).flatten(1).norm(dim=1).count_nonzero() >= 4
    assert len({tuple(left.flatten()[:4].tolist()) for left in drawn}) >= 3


@pytest.mark.parametrize("kind", CASES)
def test_under_autocast_outputs_are_bf16_and_gradients_float32(kind: str) -> None:
    form = next(form for form in ("conv", "mixed", "tucker") if form in CASES[kind].forms)
    network, text, unet = trained(kind, form, 7581)
    exact = outputs(text, unet, 7582)
    with torch.autocast("cpu", torch.bfloat16):
        gradients_by_dtype = [
            adapter.target.module(torch.randn(2, 8)) for name, adapter in network.adapters.items() if name == LINEAR
        ]
        rounded = outputs(text, unet, 7582)
    assert gradients_by_dtype[0].dtype == torch.bfloat16
    for actual, expected in zip(rounded, exact, strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.15)
    sum(out.float().square().sum() for out in rounded).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert network.adapters[CONV].target.kind == "conv"


@pytest.mark.parametrize("kind", CASES)
def test_a_recomputed_layer_gets_the_same_gradients_with_dropout(kind: str) -> None:
    network, _, unet = trained(kind, "plain", 7591, neuron_dropout="0.4", module_dropout="0.2")
    network.train()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(7592)
        x = torch.randn(1, 6, 4, 4)
        out = torch.utils.checkpoint.checkpoint(unet, x, use_reentrant=False) if recompute else unet(x)
        grads.append(
            torch.autograd.grad(
                out.square().sum(), [p for n, p in network.named_parameters() if "unet" in n], allow_unused=True
            )
        )
    for expected, actual in zip(*grads, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None and actual is not None:
            torch.testing.assert_close(expected, actual, **FLOAT32_SAME_MATH)


TOGETHER = {  # accepted by every kind, combined
    "conv_dim": "2", "use_scalar": "True", "train_norm": "True", "neuron_dropout": "0.1", "module_dropout": "0.1",
    "network_reg_dims": "mid_attention_to_q=4", "network_reg_lrs": "up_0_attention=1e-3", "block_dims": "0,2,3,2",
    "down_lr_weight": "0.5", "mid_lr_weight": "2", "exclude_patterns": ".*time_emb.*", "verbose": "True",
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_all_options_work_together(tmp_path: Path, kind: str) -> None:
    """One network with every option of the kind: it trains in groups, norms are limited, and its file reloads."""
    text, unet = toy_models(7601)
    before = outputs(text, unet, 7602)
    network_module: Any = CASES[kind].network_module
    network = network_module.create_network(1.0, 2, 2.0, None, text, unet, **TOGETHER, **CASES[kind].own)
    network.apply_to(text, unet)
    assert_same([out.detach() for out in outputs(text, unet, 7602)], before)
    groups, names = network.prepare_optimizer_params([1e-3], 1e-4, 1e-3)
    assert len(names) == len(set(names)) == len(groups) > 4
    assert any("block" in name for name in names) and any("reg_lr" in name for name in names)
    assert any(name.endswith("plus") for name in names) == (LORAPLUS in CASES[kind].own)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    optimizer = torch.optim.Adam(groups, eps=1e-20)
    network.prepare_grad_etc(text, unet)
    network.train()
    torch.manual_seed(7603)
    moved = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for step in range(4):
        network.on_optimizer_step_start(1, step)
        optimizer.zero_grad()
        sum(out.square().sum() for out in outputs(text, unet, 7604 + step)).backward()  # type: ignore[union-attr]
        optimizer.step()
        network.apply_max_norm_regularization(5.0, "cpu")
    still = [name for name, parameter in network.named_parameters() if torch.equal(moved[name], parameter)]
    assert not still
    network.eval()
    expected = [out.detach() for out in outputs(text, unet, 7609)]
    path = str(tmp_path / "x.safetensors")
    network.save_weights(path, None, {})
    network.remove()
    second, _ = network_module.create_network_from_weights(1.0, path, None, text, unet, neuron_dropout=0.5)
    second.apply_to(text, unet)
    second.load_weights(path)
    second.eval()
    assert_same([out.detach() for out in outputs(text, unet, 7609)], expected)
