"""DyLoRA: every prefix of the ranks is an adapter, and each step trains one of them."""

import copy
import logging
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.base.randomness import random_for
from networks import dylora, lora
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.dropout import Dropout
from networks.core.kinds.dylora import STREAM, DyloraArguments, NestedRank, resolve_nested_rank
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, module_of
from tests.unit.networks.toy import randomize, toy_models
from tools.extract_lora_from_dylora import main as extract

CONV = {"conv_dim": "6", "conv_alpha": "3"}


def network_on(
    models: tuple[nn.Module, nn.Module], seed: int, rank: int = 12, alpha: float = 5.0, **arguments: str
) -> AdapterNetwork:
    """Return an installed network with random weights, as after training."""
    network = dylora.create_network(1.0, rank, alpha, None, *models, **arguments)
    randomize(network, seed)
    network.apply_to(*models)
    return network


def ranks_of(network: AdapterNetwork) -> dict[str, int]:
    """Return the ranks that are active in the current step, by module."""
    ranks = {}
    for name, adapter in network.adapters.items():
        if isinstance(adapter.change, ScaledDelta) and isinstance(adapter.change.delta, NestedRank):
            assert adapter.change.delta._rows is not None
            ranks[name] = adapter.change.delta._rows[1]
    return ranks


def steps_by_rank(network: AdapterNetwork, seed: int, name: str, num_steps: int = 300) -> dict[int, int]:
    """Map each rank of one module to a step that trains it; leaves the network at the last step."""
    steps = {}
    for step in range(num_steps):
        network.on_optimizer_step_start(seed, step)
        steps[ranks_of(network)[name]] = step
    return dict(sorted(steps.items()))


def outputs(models: tuple[nn.Module, nn.Module], seed: int) -> tuple[Tensor, Tensor]:
    text, unet = models
    dtype = next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    x_BTC = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).to(dtype)
    x_BCHW = torch.randn(2, 6, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return text(x_BTC), unet(x_BCHW)


@pytest.mark.parametrize(
    ("unit", "ranks"), [("1", range(1, 13)), ("3", [3, 6, 9, 12]), ("12", [12])], ids=["unit 1", "unit 3", "unit 12"]
)
def test_a_file_truncated_to_a_rank_computes_what_training_at_that_rank_computed(
    tmp_path: Path, unit: str, ranks: list[int]
) -> None:
    models = toy_models(1)
    bare = copy.deepcopy(models)
    network = network_on(models, 2, unit=unit, **CONV)
    steps = steps_by_rank(network, 3, "lora_unet_mid_attention_to_q")
    assert list(steps) == list(ranks)

    path = tmp_path / "all.safetensors"
    network.save_weights(str(path), None, {})
    assert extract(["--model", str(path), "--save_to", str(path), "--unit", unit]) == 0
    alone = outputs(bare, 4)
    for rank, step in steps.items():
        network.on_optimizer_step_start(3, step)
        trained = outputs(models, 4)
        cut_models = copy.deepcopy(bare)
        file = str(tmp_path / f"all-{rank:04d}.safetensors")
        cut, _ = lora.create_network_from_weights(1.0, file, None, *cut_models)
        cut.apply_to(*cut_models)
        cut.load_weights(file)
        assert {a.change.delta.rank for name, a in cut.adapters.items() if "conv1" not in name} == {rank}
        assert {a.change.delta.rank for name, a in cut.adapters.items() if "conv1" in name} == {(rank + 1) // 2}
        for got, expected, without in zip(outputs(cut_models, 4), trained, alone, strict=True):
            torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)
            assert (got - without).abs().max() > 0.01


def test_convolutions_are_truncated_in_the_units_they_were_trained_in(tmp_path: Path) -> None:
    """Rank 8 in units of 1, convolutions of rank 6 in units of 3: up to the share 6/8 they use rank 3."""
    models = toy_models(5)
    bare = copy.deepcopy(models)
    network = network_on(models, 6, rank=8, conv_dim="6", conv_unit="3")
    path = tmp_path / "all.safetensors"
    network.save_weights(str(path), None, {"ss_network_args": '{"conv_dim": "6", "conv_unit": "3"}'})
    assert extract(["--model", str(path), "--save_to", str(path), "--unit", "1"]) == 0
    conv_ranks = {}
    for rank, step in steps_by_rank(network, 7, "lora_unet_mid_attention_to_q").items():
        network.on_optimizer_step_start(7, step)
        conv_ranks[rank] = ranks_of(network)["lora_unet_mid_resnet_conv1"]
        cut_models = copy.deepcopy(bare)
        file = str(tmp_path / f"all-{rank:04d}.safetensors")
        cut, _ = lora.create_network_from_weights(1.0, file, None, *cut_models)
        cut.apply_to(*cut_models)
        cut.load_weights(file)
        torch.testing.assert_close(outputs(cut_models, 8)[1], outputs(models, 8)[1], **FLOAT32_SAME_MATH)
    assert conv_ranks == {1: 3, 2: 3, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 6}


def test_a_step_uses_one_rank_for_the_whole_network() -> None:
    network = network_on(toy_models(9), 10, unit="2")
    for step in range(20):
        network.on_optimizer_step_start(11, step)
        assert len(set(ranks_of(network).values())) == 1


def test_all_batches_and_ranks_of_a_step_and_a_resumed_run_use_the_same_rank() -> None:
    network, other = network_on(toy_models(12), 13), network_on(toy_models(14), 15)
    drawn = []
    for step in range(10):
        network.on_optimizer_step_start(16, step)
        first = ranks_of(network)
        torch.rand(3)
        random.random()
        network.on_optimizer_step_start(16, step)
        assert ranks_of(network) == first
        drawn.append(first)
    for step in reversed(range(10)):
        other.on_optimizer_step_start(16, step)
        assert ranks_of(other) == drawn[step]
    assert len({next(iter(ranks.values())) for ranks in drawn}) > 3


def test_ranks_are_drawn_uniformly_and_depend_on_the_seed() -> None:
    network = network_on(toy_models(19), 20, rank=16, unit="2")

    def drawn(seed: int, num_steps: int) -> list[int]:
        ranks = []
        for step in range(num_steps):
            network.on_optimizer_step_start(seed, step)
            ranks.append(ranks_of(network)["lora_unet_mid_attention_to_q"])
        return ranks

    ranks = drawn(21, 1600)
    counts = Counter(ranks)
    assert sorted(counts) == [2, 4, 6, 8, 10, 12, 14, 16]
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded once in 1000 seeds
    pairs = Counter(pairwise(ranks))
    assert sum((pairs[a, b] - 25) ** 2 / 25 for a in counts for b in counts) < 103.4  # 63 degrees, once in 1000
    assert drawn(22, 40) != ranks[:40]


def test_evaluation_uses_the_full_rank_in_every_step() -> None:
    models = toy_models(23)
    bare = copy.deepcopy(models)
    network = network_on(models, 24, **CONV)
    plain = lora.create_network(1.0, 12, 5.0, None, *bare, **CONV)
    plain.load_state_dict(network.state_dict())
    plain.apply_to(*bare)
    expected = outputs(bare, 25)
    assert steps_by_rank(network, 26, "lora_unet_mid_attention_to_q", 40)
    for trains in (True, False):
        network.train(trains)
        for got, full in zip(outputs(models, 25), expected, strict=True):
            if trains:
                assert (got - full).abs().max() > 1e-3
            else:
                torch.testing.assert_close(got, full, **FLOAT32_SAME_MATH)


def test_training_without_setting_the_step_is_an_error_that_says_what_to_call() -> None:
    models = toy_models(27)
    network = network_on(models, 28)
    with pytest.raises(RuntimeError, match="on_optimizer_step_start"):
        outputs(models, 29)
    network.eval()
    assert all(y.isfinite().all() for y in outputs(models, 29))


def gradients(network: AdapterNetwork, models: tuple[nn.Module, nn.Module]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, gradient of up (O, R), gradient of down (R, N)) for every module."""
    network.zero_grad()
    sum(y.square().sum() for y in outputs(models, 30)).backward()  # type: ignore[union-attr]
    for name, adapter in network.adapters.items():
        up, down = (
            adapter.change.get_parameter("lora_up.weight").grad,
            adapter.change.get_parameter("lora_down.weight").grad,
        )
        assert up is not None and down is not None
        yield name, up.flatten(1), down.flatten(1)


@pytest.mark.parametrize("trains_all", [True, False])
def test_all_rows_up_to_the_rank_or_only_the_newest_block_are_trained(trains_all: bool) -> None:
    models = toy_models(31)
    network = network_on(models, 32, unit="4", train_all_ranks=str(trains_all), **CONV)
    expected_conv = {4: (0, 2), 8: (2, 4), 12: (4, 6)}
    for rank, step in steps_by_rank(network, 33, "lora_unet_mid_attention_to_q").items():
        network.on_optimizer_step_start(33, step)
        for name, grad_OR, grad_RN in gradients(network, models):
            first, end = expected_conv[rank] if "conv1" in name else (rank - 4, rank)
            first = 0 if trains_all else first
            learns = [first <= row < end for row in range(grad_OR.shape[1])]
            assert grad_OR.ne(0).any(0).tolist() == learns, (name, rank)
            assert grad_RN.ne(0).any(1).tolist() == learns, (name, rank)


def test_the_gradient_of_the_newest_block_is_a_slice_of_the_full_gradient() -> None:
    gradients_by_mode = {}
    for trains_all in ("True", "False"):
        models = toy_models(34)
        network = network_on(models, 35, unit="4", train_all_ranks=trains_all)
        step = steps_by_rank(network, 36, "lora_unet_mid_attention_to_q")[8]
        network.on_optimizer_step_start(36, step)
        gradients_by_mode[trains_all] = list(gradients(network, models))
    for (_, up, down), (_, newest_up, newest_down) in zip(
        gradients_by_mode["True"], gradients_by_mode["False"], strict=True
    ):
        torch.testing.assert_close(newest_up[:, 4:8], up[:, 4:8], **FLOAT32_SAME_MATH)
        torch.testing.assert_close(newest_down[4:8], down[4:8], **FLOAT32_SAME_MATH)


def test_the_gradient_equals_that_of_a_plain_adapter_of_the_first_rows() -> None:
    models = toy_models(37)
    bare = copy.deepcopy(models)
    network = network_on(models, 38, **CONV)
    network.on_optimizer_step_start(39, steps_by_rank(network, 39, "lora_unet_mid_attention_to_q")[6])
    ranks = ranks_of(network)
    cut = {}
    for key, tensor in network.state_dict().items():
        rank = ranks[key.partition(".")[0]]
        full = 6 if "conv1" in key else 12
        factors = {"lora_down": tensor[:rank], "lora_up": tensor[:, :rank]} if tensor.dim() else {}
        cut[key] = factors[key.split(".")[1]] if factors else tensor * rank / full
    plain, _ = lora.create_network_from_weights(1.0, "cut", None, *bare, cut)
    plain.apply_to(*bare)
    plain.load_state_dict(cut)
    for (name, up, down), (_, plain_up, plain_down) in zip(
        gradients(network, models), gradients(plain, bare), strict=True
    ):
        torch.testing.assert_close(up[:, : ranks[name]], plain_up, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(down[: ranks[name]], plain_down, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", [{}, {"rank_dropout": "0.4"}, {"module_dropout": "0.4"}, {"dropout": "0.4"}])
def test_a_checkpointed_block_is_recomputed_at_the_same_rank(drop: dict[str, str]) -> None:
    models = toy_models(40)
    network = network_on(models, 41, **CONV, **drop)
    unet = models[1].double()
    network.double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = [p for name, p in network.named_parameters() if "_unet_" in name]
    for step in range(4):
        network.on_optimizer_step_start(42, step)
        torch.manual_seed(43 + step)
        plain = torch.autograd.grad(unet(x).square().sum(), (x, *parameters), allow_unused=True)
        torch.manual_seed(43 + step)
        recomputed = torch.autograd.grad(
            checkpoint(unet, x, use_reentrant=False).square().sum(), (x, *parameters), allow_unused=True
        )
        for expected, actual in zip(plain, recomputed, strict=True):
            assert (expected is None) == (actual is None)
            if expected is not None and actual is not None:
                torch.testing.assert_close(expected, actual, **FLOAT64)


def test_rank_dropout_masks_the_ranks_of_the_step_and_rescales_the_rest() -> None:
    layer = nn.Linear(7, 5, bias=False).requires_grad_(False)
    delta = NestedRank(layer, 6)
    x = torch.randn(400, 7)
    adapter = adapter_on(layer, delta, 6.0, drops=Dropout(rank=0.5))
    randomize(module_of(adapter), 44)
    delta.use_rows(0, 2)
    alone = layer(x)
    adapter.install()
    change = layer(x) - alone
    ups = adapter.change.get_parameter("lora_up.weight")[:, :2]
    hidden = torch.linalg.lstsq(ups, change.t()).solution.t() / (
        x @ adapter.change.get_parameter("lora_down.weight")[:2].t()
    )
    rounded = hidden.round(decimals=2)
    assert set(rounded.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (rounded > 0).float().mean().item() < 0.6


def test_loraplus_and_group_names_match_networks_lora() -> None:
    groups_by_module = []
    for module in (lora, dylora):
        models = toy_models(45)
        network = module.create_network(1.0, 4, 1, None, *models, loraplus_lr_ratio="4", down_lr_weight="1,0.5")
        network.apply_to(*models)
        groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, 1e-3)
        groups_by_module.append(
            [(name, g["lr"], [tuple(p.shape) for p in g["params"]]) for name, g in zip(names, groups, strict=True)]
        )
    assert groups_by_module[0] == groups_by_module[1]


@pytest.mark.parametrize(
    ("trains_all", "expected"), [("True", "all rows up to it learn"), ("False", "its newest block")]
)
def test_the_log_states_which_ranks_are_trained(
    caplog: pytest.LogCaptureFixture, trains_all: str, expected: str
) -> None:
    with caplog.at_level(logging.INFO):
        dylora.create_network(1.0, 12, 1, None, *toy_models(67), conv_dim="16", unit="3", train_all_ranks=trains_all)
    assert f"DyLoRA: each step trains one rank from 3 to 12 in units of 3; {expected}" in caplog.text


def test_all_block_ranks_are_trained_at_the_same_share() -> None:
    network = network_on(toy_models(46), 47, rank=4, block_dims="0,2,4,8")
    steps = steps_by_rank(network, 48, "lora_unet_up_0_attention_to_q")
    assert list(steps) == [1, 2, 3, 4, 5, 6, 7, 8]
    network.on_optimizer_step_start(48, steps[6])
    ranks = ranks_of(network)
    assert (ranks["lora_unet_down_0_attention_to_q"], ranks["lora_unet_mid_attention_to_q"]) == (2, 3)
    assert ranks["lora_te_layers_0_q_proj"] == 3


@pytest.mark.parametrize("full", [1, 5, 12, 64])
@pytest.mark.parametrize(("rank", "unit"), [(1, 1), (4, 1), (6, 3), (16, 4), (64, 1)])
def test_the_rank_of_a_step_grows_from_one_unit_to_the_full_rank(full: int, rank: int, unit: int) -> None:
    ladder = [resolve_nested_rank(rank, step_rank, full, unit) for step_rank in range(1, full + 1)]
    assert ladder == sorted(ladder) and ladder[-1] == rank
    assert all(unit <= module_rank <= rank and module_rank % unit == 0 for module_rank in ladder)
    for step_rank, module_rank in enumerate(ladder, 1):
        assert module_rank == unit or abs(module_rank - rank * step_rank / full) <= unit / 2
    assert [resolve_nested_rank(full, step_rank, full) for step_rank in range(1, full + 1)] == list(range(1, full + 1))


def test_dylora_is_an_alias_of_unit() -> None:
    for arguments in ({"dyloRA": "4"}, {"unit": "4"}, {"unit": "4", "dyloRA": "4"}):
        network = dylora.create_network(1.0, 12, 1, None, *toy_models(50), **arguments)
        assert network.arguments.of(DyloraArguments).unit == 4


@pytest.mark.parametrize(("argument", "reason"), [("dora_wd", "belong to one rank"), ("use_tucker", "mixes all ranks")])
def test_forms_that_cannot_be_nested_are_refused_as_arguments_and_in_files(argument: str, reason: str) -> None:
    arguments = {"conv_dim": "4", argument: "True"}
    with pytest.raises(ValueError, match=f"{argument} does not work with this --network_module: .*{reason}"):
        dylora.create_network(1.0, 12, 1, None, *toy_models(51), **arguments)
    weights = lora.create_network(1.0, 12, 1, None, *toy_models(51), **arguments).state_dict()
    with pytest.raises(ValueError, match=f"my.safetensors was trained with {argument}, .*{reason}"):
        dylora.create_network_from_weights(1.0, "my.safetensors", None, *toy_models(51), weights)
    dylora.create_network_from_weights(1.0, "my.safetensors", None, *toy_models(51), weights, for_inference=True)


def test_trained_scalars_and_norms_are_part_of_every_rank(tmp_path: Path) -> None:
    models = toy_models(61)
    bare = copy.deepcopy(models)
    network = network_on(models, 62, unit="4", use_scalar="True", train_norm="True")
    path = tmp_path / "all.safetensors"
    network.save_weights(str(path), None, {})
    assert extract(["--model", str(path), "--save_to", str(path), "--unit", "4"]) == 0
    for rank, step in steps_by_rank(network, 63, "lora_unet_mid_attention_to_q").items():
        network.on_optimizer_step_start(63, step)
        cut_models = copy.deepcopy(bare)
        file = str(tmp_path / f"all-{rank:04d}.safetensors")
        cut, _ = lora.create_network_from_weights(1.0, file, None, *cut_models)
        cut.apply_to(*cut_models)
        cut.load_weights(file)
        for got, expected in zip(outputs(cut_models, 64), outputs(models, 64), strict=True):
            torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)


def test_a_network_of_norms_alone_draws_no_rank() -> None:
    network = dylora.create_network(1.0, 0, 1, None, *toy_models(65), train_norm="True")
    network.on_optimizer_step_start(66, 0)
    assert all(adapter.target.kind == "norm" for adapter in network.adapters.values())


def test_dylora_arguments_warn_in_other_network_modules(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lora.create_network(1.0, 12, 1, None, *toy_models(52), dyloRA="4", train_all_ranks="False")
    assert "unit, train_all_ranks has no effect; it belongs to networks.dylora" in caplog.text


def test_ranks_in_a_file_must_be_multiples_of_the_unit() -> None:
    models = toy_models(56)
    weights = network_on(models, 57, rank=6).state_dict()
    network, _ = dylora.create_network_from_weights(1.0, "x", None, *toy_models(56), weights, unit="3")
    assert {adapter.change.delta.rank for adapter in network.adapters.values()} == {6}
    with pytest.raises(ValueError, match="unit=4: lora_te_layers_0_q_proj has rank 6"):
        dylora.create_network_from_weights(1.0, "x", None, *toy_models(56), weights, unit="4")


@pytest.mark.slow
def test_every_rank_is_near_optimal_while_a_truncated_plain_adapter_is_not() -> None:
    """A 32x32 change with singular values 0.7^n: at rank r the best approximation leaves 0.7^r of its norm."""
    torch.manual_seed(71)
    rotations = [torch.linalg.qr(torch.randn(32, 32)).Q for _ in range(2)]
    target = rotations[0] * 0.7 ** torch.arange(32) @ rotations[1]
    residuals = {}
    for is_nested in (True, False):
        layer = nn.Linear(32, 32, bias=False).requires_grad_(False)
        layer.weight.zero_()
        delta = NestedRank(layer, 8)
        adapter = adapter_on(layer, delta, 8.0)
        adapter.install()
        optimizer = torch.optim.Adam(adapter.change.parameters(), lr=0.01)
        for step in range(600):
            delta.use_rows(0, random_for(72, STREAM, step).randrange(1, 9) if is_nested else 8)
            x = torch.randn(32, 32)
            (layer(x) - x @ target.t()).square().sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        up, down = adapter.change.get_parameter("lora_up.weight"), adapter.change.get_parameter("lora_down.weight")
        errors = [(target - up[:, :r] @ down[:r]).norm() / target.norm() for r in (1, 2, 4, 8)]
        residuals[is_nested] = torch.stack(errors).detach()
    best = 0.7 ** torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert (residuals[True] < best + 0.08).all()
    assert (residuals[False][:3] > best[:3] + 0.15).all()
