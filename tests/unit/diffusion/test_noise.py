"""Noise offsets and multiresolution noise."""

import pytest
import torch
from torch import Tensor

from library.base.randomness import generator_for
from library.diffusion.noise import add_coarse_noise, add_offset, draw_strength


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def offset_of(clean_BCHW: Tensor, strength: float, adaptive: float | None, seed: int) -> Tensor:
    """Return the offset, constant over each channel, shape BC."""
    noise_BCHW = normal(tuple(clean_BCHW.shape), seed + 1000)
    added = add_offset(noise_BCHW, clean_BCHW, strength, adaptive, torch.Generator().manual_seed(seed)) - noise_BCHW
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    return added[:, :, 0, 0]


def test_an_offset_is_normal_with_the_strength_as_standard_deviation() -> None:
    added = offset_of(normal((2000, 4, 2, 2), 41), 0.15, None, seed=42)
    assert added.mean().item() == pytest.approx(0, abs=0.15 * 3.3 / 8000**0.5)
    assert added.std().item() == pytest.approx(0.15, rel=0.03)
    assert abs(torch.corrcoef(added.T)[0, 1].item()) < 0.08, "channels are shifted independently"


def test_an_adaptive_offset_follows_the_mean_of_each_channel() -> None:
    clean = normal((3, 4, 6, 5), 43) - 2.5 * normal((3, 4, 1, 1), 44)
    draws = normal((3, 4, 1, 1), 45)[:, :, 0, 0].double()  # the same seed gives the same draws
    strengths = 0.1 + 0.7 * clean.double().mean((2, 3)).abs()
    torch.testing.assert_close(offset_of(clean, 0.1, 0.7, seed=45).double(), strengths * draws, rtol=1e-4, atol=2e-6)


def test_the_strength_of_an_adaptive_offset_never_turns_negative() -> None:
    clean = torch.full((1, 2, 3, 3), 4.0)
    clean[:, 1] = 0.05
    added, plain = offset_of(clean, 0.1, -1.0, seed=46), offset_of(clean, 1.0, None, seed=46)
    assert added[0, 0] == 0, "0.1 - 4 is clamped at 0"
    assert (added / plain)[0, 1].item() == pytest.approx(0.05, rel=1e-4)


def test_a_random_strength_is_a_uniform_fraction() -> None:
    generator = torch.Generator().manual_seed(47)
    drawn = torch.tensor([draw_strength(0.4, True, generator) for _ in range(4000)])
    assert 0 <= drawn.min() < 0.001
    assert 0.399 < drawn.max() < 0.4
    assert drawn.mean().item() == pytest.approx(0.2, abs=0.4 * 3.3 / (12 * 4000) ** 0.5)
    state = generator.get_state()
    assert draw_strength(0.4, False, generator) == 0.4
    assert torch.equal(generator.get_state(), state), "a fixed strength draws nothing"


def coarsen(noise_BCHW: Tensor, iterations: int, discount: float, seed: int) -> Tensor:
    return add_coarse_noise(noise_BCHW, iterations, discount, torch.Generator().manual_seed(seed))


def test_every_sample_of_coarse_noise_has_unit_deviation() -> None:
    mixed = coarsen(normal((5, 4, 16, 24), 48), 6, 0.8, seed=49)
    assert mixed.std((1, 2, 3)).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


def test_coarse_noise_correlates_neighbours_more_with_a_larger_discount() -> None:
    def correlation(noise_BCHW: Tensor) -> float:
        return (noise_BCHW[..., :-1] * noise_BCHW[..., 1:]).mean().item()

    white = normal((16, 4, 32, 32), 50)
    weak, strong = (correlation(coarsen(white, 8, discount, seed=51)) for discount in (0.3, 0.9))
    assert abs(correlation(white)) < 0.02
    assert 0.01 < weak < strong
    assert strong > 0.3


def test_the_first_pass_has_the_resolution_of_the_noise() -> None:
    white = normal((2, 3, 9, 7), 52)
    generator = torch.Generator().manual_seed(53)
    torch.rand((), generator=generator)
    expected = (white + torch.randn(2, 3, 9, 7, generator=generator)).double()
    expected = expected / expected.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(coarsen(white, 1, 0.3, seed=53).double(), expected, rtol=1e-5, atol=1e-6)


def test_passes_end_once_a_side_has_shrunk_to_one() -> None:
    white = normal((1, 4, 4, 40), 54)
    # r is at least 2, so pass 2 shrinks a side of 4 to 1 and later passes draw nothing
    assert torch.equal(coarsen(white, 3, 0.5, seed=55), coarsen(white, 50, 0.5, seed=55))
    assert not torch.equal(coarsen(white, 1, 0.5, seed=55), coarsen(white, 2, 0.5, seed=55))


def test_noise_depends_only_on_seed_and_step() -> None:
    white = normal((2, 4, 8, 8), 56)
    first, again, other = (add_coarse_noise(white, 4, 0.5, generator_for(7, "noise", step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_coarse_noise_of_a_sample_ignores_its_neighbours() -> None:
    white = normal((2, 4, 8, 8), 57)
    louder = torch.cat([white[:1], 9 * white[1:]])
    assert torch.equal(coarsen(white, 5, 0.6, seed=58)[0], coarsen(louder, 5, 0.6, seed=58)[0])
