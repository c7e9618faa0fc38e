"""GGPO: noise on the weights during training, scaled by the norms of rows and of their gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks import lora
from networks.core.changes.ggpo import GgpoArguments, Perturbed, add_noise, draw
from networks.core.changes.low_rank import LowRank
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.toy import randomize, toy_models

LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(11, 7), (2, 5, 11)),
    "3x3": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (2, 5, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_deviations_equal_those_of_the_dense_products(name: str) -> None:
    """Compare with sd-scripts' formula on whole matrices in float64."""
    torch.manual_seed(301)
    layer = LAYERS[name][0]().requires_grad_(False)
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


@pytest.mark.parametrize("name", LAYERS)
def test_noise_on_the_output_equals_noise_on_the_weight_and_has_its_gradient(name: str) -> None:
    torch.manual_seed(303)
    make, shape = LAYERS[name]
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


def make_network(**arguments: str) -> tuple[Any, tuple[nn.Module, nn.Module]]:
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
    network, models = make_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    plain, others = make_network()
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
    network, models = make_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    step(network, models)
    network.on_gradients()
    other, others = make_network(ggpo_sigma="0.1", ggpo_beta="0.1")
    other.load_state_dict(network.state_dict())
    assert torch.equal(step(other, others), step(network, models))
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, None, {})
    assert {key.partition(".")[2] for key in load_file(path)} == {"lora_down.weight", "lora_up.weight", "alpha"}
    other.load_weights(path)


def test_only_one_of_the_two_arguments_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    network, models = make_network(ggpo_sigma="0.5")
    assert "ggpo_sigma has no effect without ggpo_beta" in caplog.text
    first = step(network, models)
    network.on_gradients()
    assert torch.equal(step(network, models), first)
