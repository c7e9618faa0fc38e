"""Noise, its offsets and levels."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.base.randomness import generator_for
from library.diffusion.inpainting import blank, draw_cloud, draw_mask, draw_polygon, draw_shapes, mask_channels
from library.diffusion.noise import add_coarse_noise, add_offset, draw_strength
from library.diffusion.timesteps import (
    LevelDraws,
    build_level_sampler,
    build_shifted_scheme,
    draw_scheme,
    draw_timesteps,
    resolution_shift,
    scheme_weights,
    shift_sigmas,
    stratify,
)
from library.options.training.flow import HYBRIDS, TIMESTEP_SAMPLINGS, FlowSamplingOptions, FlowWeightingOptions


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


# The noise levels of flow matching models follow the distributions that their names promise.

N = 200_000
KS_LIMIT = 1.95 / N**0.5  # Kolmogorov-Smirnov's 99.9 % point
Cdf = Callable[[Tensor], Tensor]


def ks_distance(drawn: Tensor, cdf: Cdf) -> float:
    """Return the Kolmogorov-Smirnov statistic: the largest distance of the empirical distribution from `cdf`."""
    values = drawn.double().sort().values
    below = torch.arange(len(values), dtype=torch.float64) / len(values)
    exact = cdf(values)
    return max((exact - below).abs().max().item(), (below + 1 / len(values) - exact).abs().max().item())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def draws() -> LevelDraws:
    return LevelDraws(N, 64, 64, generator())


def sample_levels(**settings: Any) -> Tensor:
    weighting = {k: settings.pop(k) for k in list(settings) if k in vars(FlowWeightingOptions())}
    size, patch = settings.pop("size", (64, 64)), settings.pop("patch", 2)
    draw = build_level_sampler(FlowSamplingOptions(**settings), FlowWeightingOptions(**weighting), patch)
    return draw(LevelDraws(N, *size, generator()))


def logit_normal(mean: float, deviation: float) -> Cdf:
    return lambda x: 0.5 * (1 + torch.erf((torch.logit(x) - mean) / (deviation * math.sqrt(2))))


def shifted(shift: float, cdf: Cdf) -> Cdf:
    """Return the distribution after the shift s q / (1 + (s - 1) q), which grows with q."""
    return lambda x: cdf(x / (shift - (shift - 1) * x))


def uniform(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def test_the_statistic_distinguishes_distributions() -> None:
    assert ks_distance(sample_levels(timestep_sampling="uniform"), logit_normal(0, 1)) > 20 * KS_LIMIT
    assert (
        ks_distance(sample_levels(timestep_sampling="sigmoid", sigmoid_scale=1.05), logit_normal(0, 1)) > 2 * KS_LIMIT
    )


def test_uniform_sampling_is_uniform_and_ignores_the_shift() -> None:
    assert ks_distance(sample_levels(timestep_sampling="uniform", discrete_flow_shift=9.0), uniform) < KS_LIMIT


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.5])
def test_sigmoid_sampling_is_logit_normal(scale: float) -> None:
    assert (
        ks_distance(sample_levels(timestep_sampling="sigmoid", sigmoid_scale=scale), logit_normal(0, scale)) < KS_LIMIT
    )


@pytest.mark.parametrize("shift", [0.6, 3.0, 6.0])
def test_shift_sampling_adds_the_log_shift_to_the_logit(shift: float) -> None:
    drawn = sample_levels(timestep_sampling="shift", discrete_flow_shift=shift, sigmoid_scale=1.3)
    assert ks_distance(drawn, logit_normal(math.log(shift), 1.3)) < KS_LIMIT, "a shift moves the logit by its logarithm"


@pytest.mark.parametrize(("size", "m"), [((32, 32), 0.5), ((128, 128), 1.15), ((64, 128), 0.5 + 0.65 * 1792 / 3840)])
def test_flux_shift_grows_with_the_image(size: tuple[int, int], m: float) -> None:
    assert resolution_shift(*size) == pytest.approx(math.exp(m))
    assert resolution_shift(size[0] + 1, size[1] + 1) == pytest.approx(math.exp(m)), "half a token does not count"
    assert ks_distance(sample_levels(timestep_sampling="flux_shift", size=size), logit_normal(m, 1)) < KS_LIMIT


@pytest.mark.parametrize(
    ("kind", "size", "m"),
    [
        ("flux2_shift", (16, 16), 0.5),
        ("flux2_shift", (64, 64), 1.15),
        ("flux_shift", (64, 64), 1.15),  # the same formula: tokens are counted as the denoiser has them
        ("qwen_shift", (16, 16), 0.5),
        ("qwen_shift", (64, 128), 0.9),
        ("krea2_shift", (16, 16), 0.5),
        ("krea2_shift", (80, 80), 1.15),
    ],
)
def test_shifts_count_the_tokens_of_the_denoiser(kind: str, size: tuple[int, int], m: float) -> None:
    assert ks_distance(sample_levels(timestep_sampling=kind, size=size, patch=1), logit_normal(m, 1)) < KS_LIMIT
    twice = (2 * size[0], 2 * size[1])
    assert ks_distance(sample_levels(timestep_sampling=kind, size=twice), logit_normal(m, 1)) < KS_LIMIT


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-6.0, 2.0)])
def test_logsnr_has_a_normal_log_snr(mean: float, deviation: float) -> None:
    """log((1 - sigma) / sigma) is half of the log-SNR, so the logit of the level is normal too."""
    drawn = sample_levels(timestep_sampling="logsnr", logit_mean=mean, logit_std=deviation)
    assert ks_distance(drawn, logit_normal(-mean / 2, deviation / 2)) < KS_LIMIT


def mixture(*parts: tuple[float, Cdf]) -> Cdf:
    return lambda x: torch.stack([share * cdf(x) for share, cdf in parts]).sum(0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "qinglong_flux",
            mixture((0.79, logit_normal(1.15, 1)), (0.11, logit_normal(3, 1)), (0.1, logit_normal(-2.68, 0.5))),
        ),
        ("qinglong_qwen", mixture((0.95, logit_normal(0.9, 1)), (0.05, logit_normal(-2.68, 0.5)))),
    ],
)
def test_hybrids_are_mixtures_of_shift_and_log_snr_distributions(kind: str, expected: Cdf) -> None:
    size = (64, 64) if kind == "qinglong_flux" else (64, 128)
    settings = {"logit_mean": -6.0, "logit_std": 2.0, "size": size, "patch": 1}
    assert ks_distance(sample_levels(timestep_sampling=kind, **settings), expected) < KS_LIMIT


def test_nextdit_shift_shifts_uniform_draws() -> None:
    drawn = sample_levels(timestep_sampling="nextdit_shift", size=(32, 32))
    assert ks_distance(drawn, shifted(math.exp(0.5), uniform)) < KS_LIMIT
    assert drawn.min() > 0


def test_sigma_takes_entries_of_a_shifted_table() -> None:
    drawn = sample_levels(timestep_sampling="sigma", discrete_flow_shift=3.0)
    table = [3 * (i / 1000) / (1 + 2 * i / 1000) for i in range(1, 1001)]
    torch.testing.assert_close(drawn.unique(), torch.tensor(table), rtol=1e-6, atol=0)
    assert ks_distance(drawn, shifted(3.0, uniform)) < KS_LIMIT + 1 / 1000, "a table of 1000 steps is that coarse"


@pytest.mark.parametrize("kind", sorted({*TIMESTEP_SAMPLINGS, "nextdit_shift"} - {*HYBRIDS}))
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_draws_at_the_ends_give_levels_that_can_be_trained(kind: str, u: float) -> None:
    """float32 rounds to exactly 0 and 1, for which the table has no entry and a normal value no quantile."""
    sampling = FlowSamplingOptions(timestep_sampling=kind, discrete_flow_shift=1.0)
    draw = build_level_sampler(sampling, FlowWeightingOptions())
    (level,) = draw(LevelDraws(1, 64, 64, generator(), uniforms_B=torch.tensor([u]))).tolist()
    # Each shift is finite, so only a uniform draw itself may be an end.
    assert 0 <= level <= 1 and (kind == "uniform" or level > 0)
    if kind == "sigma":
        assert level == (1.0 if u == 0 else pytest.approx(1 / 1000))


def test_sigma_descends_from_pure_noise_as_the_draw_grows() -> None:
    drawn = sample_levels(
        timestep_sampling="sigma", discrete_flow_shift=1.0, weighting_scheme="logit_normal", logit_mean=1.0
    )
    assert ks_distance(drawn, logit_normal(-1.0, 1.0)) < KS_LIMIT + 1 / 1000


def mode_cdf(scale: float) -> Cdf:
    """Compute the distribution by bisection, since the level falls as u grows."""

    def cdf(x: Tensor) -> Tensor:
        low, high = torch.zeros_like(x), torch.ones_like(x)
        for _ in range(60):
            u = (low + high) / 2
            is_above = 1 - u - scale * ((math.pi * u / 2).cos() ** 2 - 1 + u) > x
            low, high = torch.where(is_above, u, low), torch.where(is_above, high, u)
        return 1 - low

    return cdf


def test_a_large_mode_scale_stays_within_the_range() -> None:
    drawn = draw_scheme(FlowWeightingOptions("mode", mode_scale=9.0), draws())
    assert (drawn.min(), drawn.max()) == (0, 1)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_an_offset_moves_no_level_of_a_hybrid(kind: str) -> None:
    draw = build_level_sampler(FlowSamplingOptions(kind), FlowWeightingOptions())
    plain, moved = (draw(LevelDraws(100, 64, 64, generator(), o)) for o in (None, torch.ones(100)))
    assert torch.equal(plain, moved)


@pytest.mark.parametrize("scale", [-0.8, 0.0, 1.29, 1.75])
def test_mode_sampling_follows_its_distribution(scale: float) -> None:
    drawn = draw_scheme(FlowWeightingOptions("mode", mode_scale=scale), draws())
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert ks_distance(drawn, mode_cdf(scale)) < KS_LIMIT


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.7, 0.4)])
def test_logit_normal_sampling_follows_its_distribution(mean: float, deviation: float) -> None:
    options = FlowWeightingOptions("logit_normal", logit_mean=mean, logit_std=deviation)
    assert ks_distance(draw_scheme(options, draws()), logit_normal(mean, deviation)) < KS_LIMIT


@pytest.mark.parametrize("scheme", ["uniform", "none", "sigma_sqrt", "cosmap"])
def test_schemes_that_weight_the_loss_draw_uniformly(scheme: str) -> None:
    assert ks_distance(draw_scheme(FlowWeightingOptions(scheme), draws()), uniform) < KS_LIMIT


def test_the_training_shift_of_sd3_adds_its_logarithm_to_the_logit() -> None:
    draw = build_shifted_scheme(FlowWeightingOptions("logit_normal", logit_mean=0.2), 3.0)
    assert ks_distance(draw(draws()), logit_normal(0.2 + math.log(3), 1.0)) < KS_LIMIT


def test_shifted_sigmas_match_a_float64_computation() -> None:
    sigmas = torch.linspace(0, 1, 101)
    expected = [4.5 * s / (1 + 3.5 * s) for s in sigmas.double().tolist()]
    torch.testing.assert_close(shift_sigmas(sigmas, 4.5).double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_scheme_weights_match_their_formulas() -> None:
    sigmas = [0.001, 0.1, 0.5, 0.93, 1.0]
    weights = {s: scheme_weights(s, torch.tensor(sigmas)).tolist() for s in ("sigma_sqrt", "cosmap", "mode", "uniform")}
    assert weights["sigma_sqrt"] == pytest.approx([s**-2 for s in sigmas])
    assert weights["cosmap"] == pytest.approx([2 / (math.pi * ((1 - s) ** 2 + s**2)) for s in sigmas])
    assert weights["mode"] == weights["uniform"] == [1.0] * 5


def test_weights_stay_finite_without_noise() -> None:
    assert scheme_weights("sigma_sqrt", torch.tensor([0.0, 1e-5])).tolist() == pytest.approx([1e6, 1e6])


@pytest.mark.parametrize("num_strata", [2, 7, 1000])
def test_of_successive_draws_one_lies_in_each_stratum_wherever_a_batch_begins(num_strata: int) -> None:
    groups = stratify(num_strata, 5, 0, 3 * num_strata).view(3, num_strata)
    assert all(torch.equal((row * num_strata).long().sort().values, torch.arange(num_strata)) for row in groups)
    assert num_strata < 7 or not torch.equal((groups[0] * num_strata).long(), (groups[1] * num_strata).long())
    assert torch.equal(stratify(num_strata, 5, 3, 3), groups.flatten()[3:6])
    assert not torch.equal(stratify(num_strata, 6, 0, num_strata), groups[0])


@pytest.mark.parametrize("kind", TIMESTEP_SAMPLINGS)
def test_stratified_levels_have_the_same_distribution_and_steadier_means(kind: str) -> None:
    weighting = {"weighting_scheme": "logit_normal"} if kind == "sigma" else {}
    reference = sample_levels(timestep_sampling=kind, **weighting)
    draw = build_level_sampler(FlowSamplingOptions(kind), FlowWeightingOptions(**weighting))
    drawn = draw(LevelDraws(4000, 64, 64, generator(), None, stratify(10, 3, 0, 4000)))
    quantiles = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(drawn.quantile(quantiles), reference.quantile(quantiles), rtol=0, atol=0.03)
    spread, independent = drawn.view(-1, 10).mean(1).std(), reference.view(-1, 10).mean(1).std()
    assert spread < (0.9 if kind in HYBRIDS else 0.6) * independent  # a fifth of some hybrids is independent


# Timesteps are uniform between their limits.


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


# Random masks for inpainting.


@pytest.mark.parametrize("draw", [draw_cloud, draw_polygon, draw_shapes])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 320), (192, 1024)])
def test_each_kind_of_mask_covers_a_part_that_varies_between_draws(draw, width, height):
    masks = [draw(width, height, np.random.default_rng(seed)) for seed in range(20, 60)]
    assert all(mask.shape == (height, width) and set(np.unique(mask)) <= {0, 1} for mask in masks)
    shares = np.array([mask.mean() for mask in masks])
    assert shares.max() < 0.95 and shares.mean() > 0.05 and shares.std() > 0.02
    again = draw(width, height, np.random.default_rng(20))
    assert np.array_equal(masks[0], again) and not np.array_equal(masks[0], masks[1])


def test_masks_vary_and_are_never_empty_or_full():
    rng = np.random.default_rng(81)
    masks = [draw_mask(64, 72, rng) for _ in range(200)]
    assert all(0 < mask.mean() < 1 for mask in masks)
    edges = [np.abs(np.diff(mask, axis=1)).sum() for mask in masks]
    assert len(set(edges)) > 100


def test_the_model_gets_the_mask_at_latent_size_and_the_image_blanked_under_it():
    generator = torch.Generator().manual_seed(82)
    masks = torch.zeros(2, 1, 32, 48)
    masks[0, :, 8:24, 16:40] = 1
    masks[1, :, :, 24:] = 1
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    blanked = blank(pixels, masks)
    assert (blanked[masks.expand_as(blanked) == 1] == 0).all()
    assert torch.equal(blanked[masks.expand_as(blanked) == 0], pixels[masks.expand_as(blanked) == 0])
    latents = torch.randn(2, 4, 4, 6, generator=generator)
    channels = mask_channels(masks, latents)
    assert channels.shape == (2, 5, 4, 6) and torch.equal(channels[:, 1:], latents)
    assert channels[0, 0].tolist() == [[0] * 6, *[[0, 0, 1, 1, 1, 0]] * 2, [0] * 6]
    assert channels[1, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 4
