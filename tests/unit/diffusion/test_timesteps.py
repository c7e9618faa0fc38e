"""Timesteps are uniform between their limits."""

import pytest
import torch

from library.diffusion.timesteps import draw_timesteps


def draw(n: int, low: int, high: int, seed: int) -> torch.Tensor:
    return draw_timesteps(n, low, high, torch.Generator().manual_seed(seed), num_timesteps=1000)


def test_timesteps_are_uniform_below_the_upper_limit() -> None:
    drawn = draw(40_000, 200, 240, seed=31)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=1000)
    assert counts.sum() == counts[200:240].sum() == 40_000
    chi_square = ((counts[200:240].double() - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 72.1, "the 99.9 % point of chi-square with 39 degrees of freedom"


def test_every_timestep_of_the_schedule_is_drawn() -> None:
    counts = torch.bincount(draw(100_000, 0, 1000, seed=32), minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 50
    # Kolmogorov-Smirnov: the distance of the two distribution functions, 99.9 % point 1.95 / sqrt(n)
    distance = (counts.cumsum(0) / 100_000 - torch.arange(1, 1001) / 1000).abs().max().item()
    assert distance < 1.95 / 100_000**0.5


@pytest.mark.parametrize(("low", "high"), [(400, 400), (700, 400), (999, 999), (0, 0)])
def test_an_empty_range_gives_every_sample_the_upper_limit(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(33)
    before = generator.get_state()
    assert draw_timesteps(5, low, high, generator, num_timesteps=1000).tolist() == [high] * 5
    assert torch.equal(generator.get_state(), before), "nothing is drawn"


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-1, 500, "--min_timestep is -1"),
        (1000, 1000, "--min_timestep is 1000"),
        (0, 1001, "--max_timestep is 1001"),
        (5, -1, "--max_timestep is -1"),
    ],
)
def test_limits_outside_the_schedule_are_refused(low: int, high: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(2, low, high, seed=34)
