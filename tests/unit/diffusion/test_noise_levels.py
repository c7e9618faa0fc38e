"""The noise levels of flow matching models follow the distributions that their names promise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from library.diffusion.timesteps import (
    LevelDraws,
    build_level_sampler,
    build_shifted_scheme,
    draw_scheme,
    resolution_shift,
    scheme_weights,
    shift_sigmas,
    stratify,
)
from library.options.training.flow import HYBRIDS, TIMESTEP_SAMPLINGS, FlowSamplingOptions, FlowWeightingOptions

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
