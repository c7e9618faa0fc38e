"""Stochastic rounding is unbiased, and bf16 training progresses where rounding to nearest stalls."""

import pytest
import torch
from torch import Tensor, nn

from library.training.optimization.rounding import round_to_bf16, stochastic_rounding


def test_values_are_rounded_to_a_neighbour_and_unchanged_on_average() -> None:
    torch.manual_seed(801)
    values = torch.cat([torch.randn(40), torch.randn(40) * 1e-20, torch.tensor([0.0, -0.0, 1.0, -2.5])])
    generator = torch.Generator().manual_seed(802)
    num_draws = 4_000
    rounded = torch.stack([round_to_bf16(values, generator).double() for _ in range(num_draws)])
    below = torch.minimum(values.abs().view(torch.int32) >> 16 << 16, values.abs().view(torch.int32)).view(
        torch.float32
    )
    spacing = ((below.view(torch.int32) + (1 << 16)).view(torch.float32) - below).double()
    assert ((rounded - values.double()).abs() < spacing).all()
    # The mean of draws between two neighbours errs by at most half a spacing / sqrt(draws): five times that.
    error = (rounded.mean(0) - values.double()).abs()
    assert (error <= 5 * 0.5 * spacing / num_draws**0.5).all()
    exact = values.bfloat16().float() == values
    assert exact.sum() >= 4
    assert torch.equal(rounded[:, exact], values[exact].double().expand(num_draws, -1))


def test_non_finite_values_are_unchanged() -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = round_to_bf16(values, torch.Generator().manual_seed(803))
    assert rounded[:2].tolist() == [float("inf"), -float("inf")]
    assert rounded[2].isnan()


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 12, generator=generator)
    return inputs, inputs @ torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_training_reaches_the_float32_loss_where_plain_bf16_stalls(name: str) -> None:
    """Linear regression in small steps: plain bf16 loses updates below 1/512 of a weight, stochastic rounding does not.

    Losses are of the float32 arithmetic with each run's weights, relative to that at the start.
    """
    inputs, targets, start = problem(804)
    make = {
        "AdamW": lambda weights: torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.0),
        "SGD": lambda weights: torch.optim.SGD(weights, lr=1e-2),
    }[name]
    reached = {}
    for kind in ("float32", "bf16", "rounded"):
        weight = nn.Parameter(start.clone().to(torch.float32 if kind == "float32" else torch.bfloat16))
        optimizer = make([weight])
        for step in range(1000):
            loss = (inputs @ weight.float() - targets).square().mean()
            loss.backward()
            if kind == "rounded":
                with stochastic_rounding([weight], torch.Generator().manual_seed(805_000 + step)):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert weight.dtype == (torch.float32 if kind == "float32" else torch.bfloat16)
        first = float((inputs @ start - targets).square().mean())
        reached[kind] = float((inputs @ weight.detach().float() - targets).square().mean()) / first
    assert reached["float32"] < 0.01
    assert reached["rounded"] == pytest.approx(reached["float32"], abs=0.003)
    assert reached["bf16"] > 10 * reached["rounded"]


def test_the_optimizer_state_is_float32_and_gradients_are_freed() -> None:
    weight, other = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight, other], lr=0.1)
    weight.grad, other.grad = torch.ones(3, dtype=torch.bfloat16), torch.ones(2)
    with stochastic_rounding([weight, other], torch.Generator().manual_seed(806)):
        assert weight.dtype == torch.float32
        optimizer.step()
    assert (weight.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    assert weight.grad is None
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
