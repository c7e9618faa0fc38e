"""All adapters of a run: placement, learning rates, merging."""

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.arguments.common import RateArguments
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Delta
from networks.core.changes.dora import Decompose, DoRA
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_pieces import InRows, LinearRows, changes_in, rows_of
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import make_fresh
from networks.lora import create_network, create_network_from_weights
from tests.tolerances import FLOAT64
from tests.unit.networks.toy import randomize, toy_models


def names(network: torch.nn.Module) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in network.state_dict()))


def test_names_are_prefix_and_path_with_text_encoders_first() -> None:
    text, unet = toy_models(1)
    network = create_network(1.0, 4, 1, None, text, unet)
    places = ("down_0", "mid", "up_0")
    assert names(network) == ["lora_te_layers_0_q_proj", "lora_te_layers_1_q_proj"] + [
        f"lora_unet_{place}_attention_{layer}" for place in places for layer in ("proj_in", "to_q")
    ]
    leaves = {key.partition(".")[2] for key in network.state_dict()}
    assert leaves == {"alpha", "lora_down.weight", "lora_up.weight"}


def test_rank_defaults_to_4_and_alpha_to_1() -> None:
    text, unet = toy_models(2)
    network = create_network(1.0, None, None, None, text, unet)
    state = network.state_dict()
    assert state["lora_te_layers_0_q_proj.lora_down.weight"].shape == (4, 7)
    assert state["lora_te_layers_0_q_proj.alpha"] == 1
    assert all(adapter.change.scale == 0.25 for adapter in network.adapters.values())


def test_conv_dim_adapts_larger_kernels_and_the_plain_layers_next_to_them() -> None:
    text, unet = toy_models(3)
    state = create_network(1.0, 4, 1, None, text, unet, conv_dim="2", conv_alpha="2").state_dict()
    assert state["lora_unet_mid_resnet_conv1.lora_down.weight"].shape == (2, 6, 3, 3)
    assert state["lora_unet_mid_resnet_conv1.lora_up.weight"].shape == (6, 2, 1, 1)
    assert state["lora_unet_mid_resnet_conv1.alpha"] == 2
    assert state["lora_unet_mid_resnet_time_emb_proj.lora_down.weight"].shape == (4, 5)
    assert not any("conv_in" in key for key in state)


def test_a_second_network_in_the_same_process_is_not_changed_by_the_first() -> None:
    text, unet = toy_models(4)
    before = names(create_network(1.0, 4, 1, None, text, unet))
    create_network(1.0, 4, 1, None, text, unet, conv_dim="2")
    assert names(create_network(1.0, 4, 1, None, text, unet)) == before


@pytest.mark.parametrize(("te", "unet_too"), [(True, False), (False, True)])
def test_the_part_that_is_not_trained_is_unchanged_and_not_saved(te: bool, unet_too: bool) -> None:
    text, unet = toy_models(5)
    network = create_network(1.0, 4, 1, None, text, unet)
    randomize(network, 6)
    x_BTC, x_BCHW = torch.randn(2, 3, 7), torch.randn(1, 6, 4, 4)
    before = text(x_BTC), unet(x_BCHW)
    network.apply_to(text, unet, te, unet_too)
    assert torch.equal(text(x_BTC), before[0]) != te
    assert torch.equal(unet(x_BCHW), before[1]) != unet_too
    assert {name.startswith("lora_te") for name in names(network)} == {te}


def test_training_neither_part_is_an_error() -> None:
    text, unet = toy_models(6)
    with pytest.raises(ValueError, match="--network_train_unet_only and --network_train_text_encoder_only"):
        create_network(1.0, 4, 1, None, text, unet).apply_to(text, unet, False, False)


def test_removing_restores_the_base_model() -> None:
    text, unet = toy_models(7)
    x = torch.randn(1, 6, 4, 4)
    before, keys = unet(x), list(unet.state_dict())
    network = create_network(1.0, 4, 1, None, text, unet)
    randomize(network, 8)
    network.apply_to(text, unet)
    assert list(unet.state_dict()) == keys
    network.remove()
    assert torch.equal(unet(x), before)


def test_merging_into_bf16_adds_in_float32_and_rounds_once() -> None:
    text, unet = toy_models(10)
    text = text.bfloat16()
    network = create_network(1.0, 4, 4, None, text, unet)
    randomize(network, 11)
    weight = text.layers[0].q_proj.weight.detach().clone()
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    up, down = (state[f"lora_te_layers_0_q_proj.lora_{side}.weight"] for side in ("up", "down"))
    network.merge_to(text, unet, state, torch.bfloat16, "cpu")
    assert torch.equal(text.layers[0].q_proj.weight, (weight.float() + up @ down).bfloat16())


def test_merging_no_changes_keeps_the_memory_layout_of_every_weight() -> None:
    text, unet = toy_models(21)
    unet = unet.to(memory_format=torch.channels_last)
    weight = unet.mid.resnet.conv1.weight
    before, strides, address = weight.clone(), weight.stride(), weight.data_ptr()
    network = create_network(0.0, 4, 1, None, text, unet, conv_dim="2")
    randomize(network, 22)
    network.merge_to(text, unet, network.state_dict(), torch.float32, "cpu")
    assert torch.equal(weight, before)
    assert (weight.stride(), weight.data_ptr()) == (strides, address)


def groups_of(te_lr: object, unet_lr: float | None, lr: float, **args: str) -> dict[str, tuple[float, int]]:
    """Return (learning rate, number of parameters) by group name."""
    text, unet = toy_models(12)
    network = create_network(1.0, 4, 1, None, text, unet, **args)
    network.apply_to(text, unet)
    groups, group_names = network.prepare_optimizer_params_with_multiple_te_lrs(te_lr, unet_lr, lr)  # type: ignore[arg-type]
    assert len(groups) == len(group_names) == len(set(group_names))
    return {name: (group["lr"], len(group["params"])) for name, group in zip(group_names, groups, strict=True)}


def test_each_part_is_a_group_that_falls_back_to_the_general_rate() -> None:
    assert groups_of(None, None, 1e-3) == {"textencoder": (1e-3, 4), "unet": (1e-3, 12)}
    assert groups_of([5e-5], 1e-4, 1e-3) == {"textencoder": (5e-5, 4), "unet": (1e-4, 12)}
    assert groups_of(5e-5, None, 1e-3) == {"textencoder": (5e-5, 4), "unet": (1e-3, 12)}


def test_a_part_with_rate_0_is_frozen_but_saved() -> None:
    text, unet = toy_models(13)
    network = create_network(1.0, 4, 1, None, text, unet)
    network.apply_to(text, unet)
    _, group_names = network.prepare_optimizer_params_with_multiple_te_lrs([0.0], 1e-4, 1e-3)
    network.prepare_grad_etc(text, unet)
    assert group_names == ["unet"]
    assert len(network.get_trainable_params()) == 12
    assert len(names(network)) == 8


def test_more_text_encoder_rates_than_encoders_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert groups_of([1e-5, 2e-5], None, 1e-3)["textencoder"] == (1e-5, 4)
    assert "has 2 values, but the base model has 1 text encoder(s)" in caplog.text
    caplog.clear()
    assert groups_of([1e-5, 1e-5], None, 1e-3)["textencoder"] == (1e-5, 4)  # as kohya_ss writes one value
    assert not caplog.records


def test_loraplus_for_one_part_does_not_affect_the_other() -> None:
    got = groups_of([1e-4], 2e-4, 1e-3, loraplus_text_encoder_lr_ratio="8")
    assert got == {"textencoder": (1e-4, 2), "textencoder plus": (8e-4, 2), "unet": (2e-4, 12)}


@pytest.mark.parametrize(
    ("trains_encoder", "arguments", "message"),
    [
        (False, {"loraplus_text_encoder_lr_ratio": "4"}, "loraplus_text_encoder_lr_ratio has no effect: no layer of a"),
        (
            True,
            {"loraplus_unet_lr_ratio": "4", "down_lr_weight": "0.5"},
            "loraplus_unet_lr_ratio, down_lr_weight has no effect: no layer of the denoiser is adapted",
        ),
    ],
)
def test_rates_of_a_side_without_adapters_are_warned_about(
    trains_encoder: bool, arguments: dict[str, str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, unet = toy_models(16)
    network = create_network(1.0, 4, 2, None, text, unet, **arguments)
    network.apply_to(text, unet, trains_encoder, not trains_encoder)
    network.prepare_optimizer_params(1.0, 1.0, 1.0)
    assert message in caplog.text


def test_blocks_with_rate_factors_are_separate_groups() -> None:
    got = groups_of([1e-4], 1e-3, 1e-3, down_lr_weight="1,0.5", mid_lr_weight="0", loraplus_unet_lr_ratio="2")
    assert got == {
        "textencoder": (1e-4, 4),
        "unet_block1": (5e-4, 2),
        "unet_block1 plus": (1e-3, 2),
        "unet_block3": (1e-3, 2),
        "unet_block3 plus": (2e-3, 2),
    }


def test_a_network_from_a_file_takes_its_ranks_and_alphas_and_keeps_the_dropout_settings() -> None:
    text, unet = toy_models(14)
    source = create_network(1.0, 4, 2, None, text, unet, block_dims="0,1,2,3", conv_dim="2")
    network, tensors = create_network_from_weights(
        1.0, "file", None, text, unet, source.state_dict(), dropout="0.1", rank_dropout="0.2", loraplus_lr_ratio="2"
    )
    assert tensors.keys() == source.state_dict().keys()
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    for name, adapter in network.adapters.items():
        assert (adapter.change.delta.rank, adapter.change.alpha_value) == (
            source.adapters[name].change.delta.rank,
            source.adapters[name].change.alpha_value,
        )
        assert (adapter.change.drops.neuron, adapter.change.drops.rank) == (0.1, 0.2)
    assert network.arguments.of(RateArguments).loraplus_lr_ratio == 2.0


def test_a_file_overrides_rank_arguments_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(15)
    source = create_network(1.0, 4, 2, None, text, unet)
    with caplog.at_level(logging.WARNING):
        create_network_from_weights(1.0, "file", None, text, unet, source.state_dict(), conv_dim="4", conv_alpha="1")
    assert "conv_dim, conv_alpha has no effect" in caplog.text


def test_a_file_of_another_base_model_is_refused() -> None:
    text, unet = toy_models(16)
    foreign = {
        "lora_unet_other.lora_down.weight": torch.zeros(2, 3),
        "lora_unet_other.lora_up.weight": torch.zeros(3, 2),
    }
    with pytest.raises(ValueError, match="none of its 1 modules is in this base model"):
        create_network_from_weights(1.0, "x.safetensors", None, text, unet, foreign)


def test_a_denoiser_without_adapter_targets_is_named() -> None:
    text, _ = toy_models(17)
    with pytest.raises(ValueError, match="Linear says nothing about what adapters may attach to"):
        create_network(1.0, 4, 1, None, text, torch.nn.Linear(2, 2))


def test_rank_0_everywhere_or_negative_settings_are_errors() -> None:
    text, unet = toy_models(18)
    with pytest.raises(ValueError, match="nothing to train"):
        create_network(1.0, 0, 1, None, text, unet)
    with pytest.raises(ValueError, match=re.escape("--network_dim is -2")):
        create_network(1.0, -2, 1, None, text, unet)


def test_two_modules_with_the_same_name_are_an_error() -> None:
    text, unet = toy_models(19)
    unet.down_0 = copy.deepcopy(unet.down[0])
    with pytest.raises(
        ValueError, match="two modules of the base model have the name lora_unet_down_0_attention_proj_in"
    ):
        create_network(1.0, 4, 1, None, text, unet)


def test_adapted_modules_are_logged_in_one_line_per_part(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(20)
    with caplog.at_level(logging.INFO):
        create_network(1.0, 4, 1, None, text, unet, conv_dim="2").apply_to(text, unet)
    assert "text encoder 1: 2 modules adapted, rank 4, alpha 1, 112 parameters" in caplog.text
    assert "denoiser: 12 modules adapted, rank 2, 4, alpha 1," in caplog.text


def test_a_conv_rank_of_zero_warns_which_modules_are_still_adapted(caplog: pytest.LogCaptureFixture) -> None:
    """sd-scripts adapts the Linear layers and 1x1 convolutions of residual blocks at network_dim, and so does this."""
    text_encoder, denoiser = toy_models(17)
    plain = create_network(1.0, 4, 1.0, None, text_encoder, denoiser)
    with caplog.at_level(logging.WARNING):
        network = create_network(1.0, 4, 1.0, None, text_encoder, denoiser, conv_dim="0")
    assert len(network.adapters) > len(plain.adapters)
    assert "conv_dim=0 adapts no convolution larger than 1x1; the Linear layers and 1x1 convolutions of" in caplog.text
    assert "has no effect" not in caplog.text


# Changes of row ranges of one layer compute what separate layers compute.

PARTS = {"rows_0_1_of_4": (0, 6), "rows_2_4_of_4": (12, 24)}  # the second quarter is not changed
MAKES: dict[str, tuple[Callable[[Any], Delta], Callable[[Tensor], Decompose | None]]] = {
    "LoKr": (lambda layer: make_fresh(layer, 2, 2), lambda weight: None),
    "LoHa": (lambda layer: LoHa(layer, 2), lambda weight: None),
    "LoHa, wide": (lambda layer: LoHa(layer, 5), lambda weight: None),
    "DoRA": (lambda layer: LowRank(layer, 2), Decompose),
    "DoRA per output": (lambda layer: LowRank(layer, 2), lambda weight: Decompose(weight, is_per_output=True)),
}


def change_of(layer: nn.Linear, kind: str, seed: int) -> ScaledDelta:
    """Return a change with random weights, rank 2 and alpha 3, in float64."""
    make_delta, make_join = MAKES[kind]
    torch.manual_seed(seed)
    delta, join = make_delta(layer), make_join(layer.weight)
    change = (ScaledDelta(layer, delta, 3.0) if join is None else DoRA(layer, delta, 3.0, join)).double()
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.mul_(0.8).add_(torch.randn_like(parameter) * 0.3)
    return change


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", MAKES)
def test_output_gradients_and_merged_weight_match_separate_layers(kind: str, strength: float) -> None:
    torch.manual_seed(5301)
    layer = nn.Linear(16, 24).double().requires_grad_(False)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    changes = {name: change_of(LinearRows(layer, rows_of(name, 24)), kind, 5302 + i) for i, name in enumerate(PARTS)}
    combined = InRows(dict(reversed(changes.items())))  # files have pieces in any order
    y = combined(x, layer, strength)
    expected = layer(x).clone()
    merged = layer.weight.clone()
    twins = []
    for i, (first, stop) in enumerate(PARTS.values()):
        alone = nn.Linear(16, stop - first).double().requires_grad_(False)
        alone.weight.copy_(layer.weight[first:stop])
        alone.bias.copy_(layer.bias[first:stop])
        twins.append(change_of(alone, kind, 5302 + i))
        expected = torch.cat([expected[..., :first], twins[-1](x, alone, strength), expected[..., stop:]], -1)
        merged[first:stop] = twins[-1].merged(alone.weight, strength)
    torch.testing.assert_close(y, expected, **FLOAT64)
    assert (y - layer(x)).abs().max() > 0.1
    torch.testing.assert_close(combined.merged(layer.weight, strength), merged, **FLOAT64)
    seen_by = torch.randn_like(y)
    got = torch.autograd.grad((y * seen_by).sum(), (x, *(p for c in changes.values() for p in c.parameters())))
    expected_grads = torch.autograd.grad((expected * seen_by).sum(), (x, *(p for c in twins for p in c.parameters())))
    for actual, expected_grad in zip(got, expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, **FLOAT64)


def test_loraplus_names_and_norms_cover_all_pieces() -> None:
    torch.manual_seed(5311)
    layer = nn.Linear(16, 24).double().requires_grad_(False)
    changes = {name: change_of(LinearRows(layer, rows_of(name, 24)), "LoKr", 5312 + i) for i, name in enumerate(PARTS)}
    combined = InRows(changes)
    assert list(changes_in(combined)) == list(changes.values()) and list(changes_in(changes["rows_0_1_of_4"])) != []
    assert combined.fast_keys == {f"{name}.lokr_w1" for name in PARTS} <= dict(combined.named_parameters()).keys()
    change = combined.merged(layer.weight) - layer.weight
    torch.testing.assert_close(combined.norm(), change.norm(), **FLOAT64)
    combined.scale_(torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(combined.merged(layer.weight) - layer.weight, change * 0.25, **FLOAT64)
    assert not any(name.startswith("whole") for name, _ in combined.named_parameters())
