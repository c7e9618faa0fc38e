"""T-LoRA: the noisier a sample, the fewer ranks of the adapter apply to it."""

import logging
from typing import Any

import pytest
import torch
from lycoris.modules.tlora import compute_timestep_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.diffusion.objective import DDPM
from library.diffusion.schedules import LATENT_DIFFUSION
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Noised
from networks import lora, lora_fa, tlora
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_split import SplitRank
from networks.core.changes.tlora import NoiseLevels, NoiseMask
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double
from tests.unit.networks.toy import randomize, toy_models


@pytest.mark.parametrize(
    ("rank", "least", "power"), [(1, 1, 1.0), (4, 1, 1.0), (7, 2, 1.0), (32, 5, 2.0), (16, 16, 1.0), (12, 3, 0.5)]
)
def test_ranks_match_lycoris_at_every_timestep(rank: int, least: int, power: float) -> None:
    levels_B = torch.arange(1000) / 1000
    expected = torch.cat([compute_timestep_mask(t, 1000, rank, least, power) for t in range(1000)]).bool()
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
