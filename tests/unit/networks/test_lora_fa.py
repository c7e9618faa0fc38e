"""LoRA-FA, T-LoRA and GGPO: what is trained, how many ranks apply, and noise on the weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.diffusion.objective import DDPM
from library.diffusion.schedules import LATENT_DIFFUSION
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Noised
from networks import lora, lora_fa, tlora
from networks.core.changes.change import Delta, get_weight
from networks.core.changes.ggpo import GgpoArguments, Perturbed, add_noise, draw
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_split import SplitRank
from networks.core.changes.tlora import NoiseLevels, NoiseMask
from networks.core.kinds.lora_fa import frozen_down
from networks.core.targets.targets import adaptation_kind
from tests.hiding import lazily
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tests.unit.networks.toy import randomize, toy_models

their_tlora = lazily("lycoris.modules.tlora")

CONV = {"conv_dim": "3", "conv_alpha": "2"}


def outputs(models: tuple[nn.Module, nn.Module], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 7), (2, 6, 4, 4))
    return [model(torch.randn(shape, generator=generator)) for model, shape in zip(models, shapes, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_dropout": "0.2", "module_dropout": "0.2", "dropout": "0.2"},
        {"use_scalar": "True"},
        {"dora_wd": "True"},
        {"dora_wd": "True", "wd_on_output": "True"},
        {"train_norm": "True"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_training_changes_up_factors_and_no_down_factor(options: dict[str, str]) -> None:
    models = toy_models(1)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV, **options)
    network.apply_to(*models)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-2], 1e-2, 1e-2)
    network.prepare_grad_etc(*models)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(8):
        sum(y.square().mean() for y in outputs(models, step)).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    assert names == ["textencoder", "unet"]
    for key, tensor in network.state_dict().items():
        is_fixed = key.endswith(("lora_down.weight", "alpha"))
        assert torch.equal(tensor, before[key]) == is_fixed, key
        assert tensor.isfinite().all()
    frozen = [module for name, module in network.named_modules() if name.endswith("lora_down")]
    assert len(frozen) == 14
    assert all(get_weight(module).grad is None and not get_weight(module).requires_grad for module in frozen)


def test_only_up_factors_reach_the_optimizer_and_gradient_clipping() -> None:
    models = toy_models(2)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV)
    network.apply_to(*models)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-3)
    network.prepare_grad_etc(*models)
    ups = {id(adapter.change.get_parameter("lora_up.weight")) for adapter in network.adapters.values()}
    assert {id(p) for p in network.get_trainable_params()} == ups
    assert {id(p) for group in groups for p in group["params"]} == ups
    assert {name.rpartition("lora_")[2] for name, _ in network.named_parameters()} == {"up.weight"}
    assert len(ups) == len(network.adapters) == 14


def test_down_starts_normal_with_a_deviation_set_by_its_sizes_and_up_at_zero() -> None:
    torch.manual_seed(3)
    linear = frozen_down(nn.Linear(600, 5), 200)
    conv = frozen_down(nn.Conv2d(72, 5, 3), 128)
    for delta, deviation in ((linear, (2 / 800) ** 0.5), (conv, 0.1)):
        children = dict(delta.named_children())
        down = get_weight(children["lora_down"])
        assert down.std().item() == pytest.approx(deviation, rel=0.02)
        assert down.mean().item() == pytest.approx(0, abs=deviation / 100)
        assert 0.675 < (down.abs() < deviation).float().mean() < 0.69  # as in a normal distribution: 0.683
        assert get_weight(children["lora_up"]).count_nonzero() == 0


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (2, 50, 64)),
    "1x1": (lambda: nn.Conv2d(64, 48, 1), (2, 64, 8, 8)),
    "3x3": (lambda: nn.Conv2d(64, 48, 3, padding=1), (2, 64, 8, 8)),
}


def saved_tensors(
    name: str, make_delta: Callable[[nn.Module, int], Delta] | None, autocast: bool = False
) -> dict[int, tuple[int, ...]]:
    """Return the non-weight tensors that autograd saves for one layer's backward pass, as address -> shape."""
    torch.manual_seed(4)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    adapter: nn.Module = nn.Identity()
    if make_delta is not None:
        kind = adaptation_kind(layer)
        assert kind is not None
        installed = adapter_on(layer, make_delta(layer, 4), 2.0)
        randomize(module_of(installed), 5)
        installed.install()
        adapter = module_of(installed)
    weights = {t.data_ptr() for module in (layer, adapter) for t in module.state_dict().values()}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)  # kept alive, so that no address is reused
        return tensor

    x = torch.randn(shape, requires_grad=True)
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    return {t.data_ptr(): tuple(t.shape) for t in tensors if t.data_ptr() not in weights}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_autograd_saves_the_hidden_state_and_not_the_input_of_a_linear_layer(autocast: bool) -> None:
    """Two samples of 50 tokens with 64 features: 6400 values, and 400 at rank 4. Autocast adds copies of weights."""
    copies = {64 * 48, 64 * 4, 48 * 4} if autocast else set()
    sizes = [
        {torch.Size(shape).numel() for shape in saved_tensors("linear", make, autocast).values()}
        for make in (LowRank, frozen_down)
    ]
    assert sizes[0] - copies == {6400, 400}
    assert sizes[1] - copies == {400}


@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_for_a_convolution_the_adapter_saves_only_the_hidden_state_on_top_of_the_input(name: str) -> None:
    pixels = 2 * 8 * 8
    sizes = [sorted(torch.Size(s).numel() for s in saved_tensors(name, make).values()) for make in (None, frozen_down)]
    assert sizes == [[pixels * 64], [pixels * 4, pixels * 64]]


@pytest.mark.parametrize("module", [lora, lora_fa])
def test_lora_and_lora_fa_load_each_others_files_and_compute_the_same(module: ModuleType) -> None:
    models, others = toy_models(6), toy_models(6)
    network = lora_fa.create_network(1.0, 4, 2, None, *models, **CONV)
    randomize(network, 7)
    network.apply_to(*models)
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    other, tensors = module.create_network_from_weights(1.0, "x", None, *others, weights)
    other.apply_to(*others)
    other.load_state_dict(tensors)
    for got, expected in zip(outputs(others, 8), outputs(models, 8), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)
    other.remove()
    merged, tensors = module.create_network_from_weights(1.0, "x", None, *others, weights, for_inference=True)
    merged.merge_to(*others, tensors, torch.float32, "cpu")
    for got, expected in zip(outputs(others, 8), outputs(models, 8), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32_SAME_MATH)


def test_training_a_file_further_keeps_its_down_factors() -> None:
    models = toy_models(9)
    source = lora.create_network(1.0, 4, 2, None, *models)
    randomize(source, 10)
    network, weights = lora_fa.create_network_from_weights(1.0, "x", None, *models, source.state_dict())
    network.load_state_dict(weights)
    for key, tensor in source.state_dict().items():
        assert torch.equal(network.state_dict()[key], tensor)


def test_a_loraplus_ratio_only_multiplies_the_rate_and_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    models = toy_models(11)
    with caplog.at_level(logging.WARNING):
        network = lora_fa.create_network(1.0, 4, 2, None, *models, loraplus_unet_lr_ratio="8")
    network.apply_to(*models)
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-4], 1e-3, 1e-3)
    assert dict(zip(names, (group["lr"] for group in groups), strict=True)) == {"textencoder": 1e-4, "unet plus": 8e-3}
    assert "loraplus_unet_lr_ratio: networks.lora_fa trains up factors only" in caplog.text


def test_limiting_the_norm_of_a_change_scales_only_its_up_factor() -> None:
    network = lora_fa.create_network(1.0, 4, 2, None, *toy_models(15), **CONV)
    randomize(network, 16)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    network.apply_max_norm_regularization(0.5, "cpu")
    for name, adapter in network.adapters.items():
        assert torch.equal(network.state_dict()[f"{name}.lora_down.weight"], before[f"{name}.lora_down.weight"])
        assert adapter.change.weight().norm() <= 0.5 * 1.0001


# T-LoRA: the noisier a sample, the fewer ranks of the adapter apply to it.


@pytest.mark.parametrize(
    ("rank", "least", "power"), [(1, 1, 1.0), (4, 1, 1.0), (7, 2, 1.0), (32, 5, 2.0), (16, 16, 1.0), (12, 3, 0.5)]
)
def test_ranks_match_lycoris_at_every_timestep(rank: int, least: int, power: float) -> None:
    levels_B = torch.arange(1000) / 1000
    expected = torch.cat([their_tlora.compute_timestep_mask(t, 1000, rank, least, power) for t in range(1000)]).bool()
    assert torch.equal(NoiseMask(least, power, NoiseLevels()).kept(rank, rank, levels_B), expected)


def test_pure_noise_uses_the_fewest_ranks_and_a_small_module_all_of_its_ranks() -> None:
    levels_B = torch.tensor([0.0, 0.25, 0.999, 1.0])
    assert NoiseMask(2, 1.0, NoiseLevels()).ranks(10, levels_B).tolist() == [10, 8, 2, 2]
    assert NoiseMask(9, 1.0, NoiseLevels()).ranks(4, levels_B).tolist() == [4, 4, 4, 4]


def test_a_noise_level_is_the_timesteps_share_of_the_schedule() -> None:
    objective = DDPM(
        LATENT_DIFFUSION.abar(False), LATENT_DIFFUSION.abar(False), False, 0, 1000, NoiseOptions(), LossOptions()
    )
    nothing = torch.zeros(3, 1, 1, 1)
    noised = Noised(nothing, nothing, nothing, torch.tensor([0.0, 1.0, 9.0]), torch.tensor([0, 400, 999]))
    assert objective.noise_levels(noised).tolist() == pytest.approx([0.0, 0.4, 0.999])


def layers() -> dict[str, tuple[nn.Module, Any, Tensor]]:
    """Return layers, deltas of rank 3 and inputs of two samples, in float64."""
    torch.manual_seed(71)
    linear, conv = nn.Linear(5, 6).double(), nn.Conv2d(4, 3, 3, padding=1).double()
    return {
        "linear": (linear, LowRank(linear, 3), torch.randn(2, 7, 5).double()),
        "vector": (linear, LowRank(linear, 3), torch.randn(2, 5).double()),
        "conv": (conv, LowRank(conv, 3), torch.randn(2, 4, 5, 5).double()),
        "split": (linear, SplitRank(linear, 3, [2, 4]), torch.randn(2, 7, 5).double()),
    }


@pytest.mark.parametrize("name", ["linear", "vector", "conv", "split"])
def test_each_sample_uses_the_first_ranks_for_its_noise_level(name: str) -> None:
    layer, delta, x = layers()[name]
    adapter = double(adapter_on(layer, delta, 1.5))
    randomize(adapter.change, 72)  # type: ignore[arg-type]
    change: Any = adapter.change
    change.mask = NoiseMask(1, 1.0, NoiseLevels(torch.tensor([0.0, 0.9])))
    adapter.install()
    actual = layer(x)
    adapter.remove()
    ranks = [3, 1]
    up_OK, down_KN = delta.factors()
    for place, rank in enumerate(ranks):
        kept_K = torch.arange(down_KN.shape[0]) % 3 < rank
        weight = 0.5 * (up_OK[:, kept_K] @ down_KN[kept_K])
        merged = layer.weight + weight.view_as(layer.weight)  # type: ignore[operator]
        expected = torch.func.functional_call(layer, {"weight": merged}, (x[place : place + 1],), strict=False)
        torch.testing.assert_close(actual[place : place + 1], expected, **FLOAT64)


def make_network(network_module: Any, **arguments: str) -> tuple[Any, tuple[nn.Module, nn.Module]]:
    models = toy_models(73)
    network = network_module.create_network(1.0, 6, 3.0, None, *models, conv_dim="4", **arguments)
    randomize(network, 74)
    network.apply_to(*models)
    return network, models


def gradients(network: Any, models: tuple[nn.Module, nn.Module], is_recomputed: bool = False) -> list[Tensor]:
    network.zero_grad()
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(75))
    out = checkpoint(models[1], x, use_reentrant=False) if is_recomputed else models[1](x)
    text = models[0](torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(76)))
    (out.square().sum() + text.square().sum()).backward()
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("arguments", [{}, {"use_tucker": "True"}, {"use_scalar": "True", "rank_dropout": "0.3"}])
def test_masked_ranks_get_no_gradient_and_recomputing_repeats_the_mask(arguments: dict[str, str]) -> None:
    network, models = make_network(tlora, tlora_min_rank="2", **arguments)
    network.on_noise_levels(torch.tensor([0.95, 1.0]))
    torch.manual_seed(77)
    plain = gradients(network, models)
    torch.manual_seed(77)
    for expected, actual in zip(plain, gradients(network, models, is_recomputed=True), strict=True):
        torch.testing.assert_close(expected, actual, **FLOAT32_SAME_MATH)
    for name, parameter in network.named_parameters():
        if name.endswith("lora_up.weight") and not arguments.get("use_scalar"):
            moved = parameter.grad.flatten(1).abs().amax(0) > 0
            assert int(moved.sum()) == (2 if name.startswith("lora_unet") else 6)  # text encoders have all ranks


def test_without_noise_levels_and_in_the_file_it_is_a_plain_lora() -> None:
    network, models = make_network(tlora)
    plain, others = make_network(lora)
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 6, 4, 4)
    network.on_noise_levels(torch.tensor([0.7, 0.7]))
    assert not torch.allclose(models[1](x), others[1](x))
    network.on_noise_levels(None)
    assert torch.equal(models[1](x), others[1](x))
    assert {k: t.shape for k, t in network.state_dict().items()} == {k: t.shape for k, t in plain.state_dict().items()}


def test_the_tlora_argument_of_other_modules_equals_networks_tlora() -> None:
    network, models = make_network(tlora, tlora_power="2")
    by_argument, others = make_network(lora, tlora="True", tlora_power="2")
    x, levels_B = torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.6])
    for each in (network, by_argument):
        each.on_noise_levels(levels_B)
    assert torch.equal(models[1](x), others[1](x))
    frozen, _ = make_network(lora_fa, tlora="True")
    assert all(a.change.mask is not None for n, a in frozen.adapters.items() if n.startswith("lora_unet"))


def test_a_tlora_setting_without_tlora_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        lora.create_network(1.0, 4, 2.0, None, *toy_models(79), tlora_min_rank="2")
    assert "tlora_min_rank has no effect without tlora=True or networks.tlora" in caplog.text


# GGPO: noise on the weights during training, scaled by the norms of rows and of their gradients.

GGPO_LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(11, 7), (2, 5, 11)),
    "3x3": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 6, 6)),
}


@pytest.mark.parametrize("name", GGPO_LAYERS)
def test_deviations_equal_those_of_the_dense_products(name: str) -> None:
    """Compare with sd-scripts' formula on whole matrices in float64."""
    torch.manual_seed(301)
    layer = GGPO_LAYERS[name][0]().requires_grad_(False)
    change = Perturbed(layer, LowRank(layer, 3), 4.0, GgpoArguments(0.03, 0.2))
    randomize(change, 302)
    for parameter in change.parameters():
        parameter.grad = torch.randn_like(parameter)
    change.note_gradients()

    up, down = (change.get_parameter(f"lora_{end}.weight") for end in ("up", "down"))
    b, a = up.detach().double().flatten(1), down.detach().double().flatten(1)
    db, da = up.grad.double().flatten(1), down.grad.double().flatten(1)
    w = layer.weight.double().flatten(1).norm(dim=1).mean()
    c = (w**2 + (b @ a).square().sum(1)).sqrt()
    g = (4 / 3 * (b @ da + db @ a)).norm(dim=1)
    expected = (0.03 * c + 0.2 * g**2) / 7**0.5
    torch.testing.assert_close(change.ggpo_deviation.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GGPO_LAYERS)
def test_noise_on_the_output_equals_noise_on_the_weight_and_has_its_gradient(name: str) -> None:
    torch.manual_seed(303)
    make, shape = GGPO_LAYERS[name]
    layer = make().double().requires_grad_(False)
    deviations_O = torch.rand(7).double()
    x = torch.randn(shape).double().requires_grad_()
    out = layer(x.detach())
    state = torch.get_rng_state()
    actual = add_noise(out, x, layer, deviations_O)
    torch.set_rng_state(state)
    noise = draw(layer, deviations_O, int(torch.randint(2**62, ())), torch.float64)
    y = x.detach().clone().requires_grad_()
    expected = torch.func.functional_call(layer, {"weight": layer.weight + noise}, (y,))
    torch.testing.assert_close(actual, expected, **FLOAT64)
    weights = torch.randn_like(actual)
    (actual * weights).sum().backward()
    ((expected - torch.func.functional_call(layer, {}, (y,))) * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **FLOAT64)
    many = torch.stack([draw(layer, deviations_O, seed, torch.float64) for seed in range(300)])
    spread_O = many.flatten(2).transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(spread_O, deviations_O, rtol=0.05, atol=0.0)  # of 300 * N values each


def test_the_base_norm_covers_all_rows_of_a_large_weight() -> None:
    torch.manual_seed(304)
    layer = nn.Linear(20, 1500).requires_grad_(False)
    layer.weight.copy_(torch.randn(1500, 20) * torch.rand(1500, 1))
    change = Perturbed(layer, LowRank(layer, 1), 1.0, GgpoArguments(1.0, 1.0))
    torch.testing.assert_close(change.base_norm, layer.weight.norm(dim=1).mean(), **FLOAT32_SAME_MATH)


def make_noisy_network(**arguments: str) -> tuple[Any, tuple[nn.Module, nn.Module]]:
    models = toy_models(305)
    network = lora.create_network(1.0, 4, 2.0, None, *models, conv_dim="2", **arguments)
    randomize(network, 306)
    network.apply_to(*models)
    return network, models


def step(network: Any, models: tuple[nn.Module, nn.Module], is_recomputed: bool = False) -> Tensor:
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(307))
    network.zero_grad()
    torch.manual_seed(308)
    out = checkpoint(models[1], x, use_reentrant=False) if is_recomputed else models[1](x)
    out.square().mean().backward()
    return out.detach()


def test_noise_starts_after_the_first_step_only_in_training_and_is_repeated_on_recompute() -> None:
    network, models = make_noisy_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    plain, others = make_noisy_network()
    first = step(network, models)
    assert torch.equal(first, step(plain, others))
    network.on_gradients()
    second = step(network, models)
    assert (second - first).abs().max() > 1e-3
    grads = [p.grad.clone() for name, p in network.named_parameters() if "lora_unet" in name]
    assert torch.equal(step(network, models, is_recomputed=True), second)
    for expected, actual in zip(
        grads, (p.grad for n, p in network.named_parameters() if "lora_unet" in n), strict=True
    ):
        torch.testing.assert_close(actual, expected, **FLOAT32_SAME_MATH)
    network.eval()
    assert torch.equal(step(network, models), first)


def test_states_contain_the_noise_and_adapter_files_do_not(tmp_path: Path) -> None:
    network, models = make_noisy_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    step(network, models)
    network.on_gradients()
    other, others = make_noisy_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    other.load_state_dict(network.state_dict())
    assert torch.equal(step(other, others), step(network, models))
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, None, {})
    assert {key.partition(".")[2] for key in load_file(path)} == {"lora_down.weight", "lora_up.weight", "alpha"}
    other.load_weights(path)


def test_only_one_of_the_two_arguments_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    network, models = make_noisy_network(ggpo_sigma="0.5")
    assert "ggpo_sigma has no effect without ggpo_beta" in caplog.text
    first = step(network, models)
    network.on_gradients()
    assert torch.equal(step(network, models), first)
