"""The flow matching objective, compared with a float64 computation from the same random draws."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.diffusion.flow import FlowMatching, Target, build_sampled_flow
from library.diffusion.timesteps import LevelDraws, build_shifted_scheme
from library.options.train import TrainOptions
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.protocols import Objective
from library.types import Noised

B, C, H, W = 6, 16, 10, 7


def options_of(**flags: Any) -> TrainOptions:
    options = TrainOptions()
    groups = {}
    for group in ("noise", "loss"):
        values = getattr(options, group)
        known = {name: flags.pop(name) for name in list(flags) if name in vars(values)}
        groups[group] = replace(values, **known)
    assert not flags, flags
    return replace(options, **groups)


def latents(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.8 * torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed)) + 0.3).to(dtype)


def flow(
    target: Target = "noise - latent", prediction: str = "raw", scheme: str = "none", **flags: Any
) -> FlowMatching:
    timestep_settings = {name: flags.pop(name, False) for name in ("has_whole_timesteps", "tells_whole_timesteps")}
    levels = build_shifted_scheme(FlowWeightingOptions(), 1.0)
    options = options_of(**flags)
    return FlowMatching(options.noise, options.loss, levels, target, prediction, scheme, **timestep_settings)


def corrupt(objective: FlowMatching, clean: Tensor, seed: int = 3) -> Noised:
    return objective.corrupt(clean, torch.Generator().manual_seed(seed))


def as_column(values_B: Tensor) -> Tensor:
    return values_B.double().view(-1, 1, 1, 1)


def test_flow_matching_implements_the_objective_protocol() -> None:
    objective: Objective = flow()
    assert isinstance(objective.at_timestep(500), FlowMatching)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noised_latents_interpolate_between_clean_latents_and_noise(dtype: torch.dtype) -> None:
    clean = latents(1, dtype)
    noised = corrupt(flow(), clean)
    g = torch.Generator().manual_seed(3)
    noise, sigmas = torch.randn(B, C, H, W, generator=g), torch.rand(B, generator=g)
    exact = (1 - as_column(sigmas)) * clean.double() + as_column(sigmas) * noise.double()
    assert noised.latents_BCHW.dtype == dtype
    torch.testing.assert_close(
        noised.latents_BCHW.double(), exact.to(dtype).double(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
    )
    assert torch.equal(noised.noise_BCHW, noise.to(dtype))
    torch.testing.assert_close(noised.sigmas_B, sigmas)


def test_noise_levels_are_float32_for_every_dtype_of_the_latents() -> None:
    noised = corrupt(flow(), latents(1, torch.bfloat16))
    assert noised.sigmas_B.dtype == noised.timesteps_B.dtype == torch.float32
    assert not torch.equal(noised.timesteps_B, noised.timesteps_B.bfloat16().float()), "nothing is rounded to bf16"
    torch.testing.assert_close(noised.timesteps_B, 1000 * noised.sigmas_B)


@pytest.mark.parametrize("target", ["noise - latent", "latent - noise", "latent"])
@pytest.mark.parametrize("prediction", ["raw", "additive", "sigma_scaled"])
def test_estimate_and_target_match_their_formulas(target: Target, prediction: str) -> None:
    objective = flow(target, prediction)
    noised = corrupt(objective, latents(2))
    output = latents(4)
    x, sigma = noised.latents_BCHW.double(), as_column(noised.sigmas_B)
    estimates = {"raw": output.double(), "additive": output.double() + x, "sigma_scaled": x - sigma * output.double()}
    velocity = noised.noise_BCHW.double() - noised.clean_BCHW.double()
    targets = {"noise - latent": velocity, "latent - noise": -velocity, "latent": noised.clean_BCHW.double()}
    torch.testing.assert_close(objective.estimate(output, noised).double(), estimates[prediction], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(objective.target(noised).double(), targets[target], rtol=1e-5, atol=1e-6)


def test_the_true_velocity_estimates_the_latent_exactly() -> None:
    objective = flow("latent", "sigma_scaled")
    noised = corrupt(objective, latents(2))
    velocity = noised.noise_BCHW - noised.clean_BCHW
    torch.testing.assert_close(objective.estimate(velocity, noised), objective.target(noised), rtol=0, atol=1e-5)


def test_estimates_are_float32_under_autocast() -> None:
    objective = flow("latent", "sigma_scaled")
    noised = corrupt(objective, latents(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.estimate(latents(4, torch.bfloat16), noised).dtype == torch.float32


@pytest.mark.parametrize("scheme", ["none", "uniform", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_the_loss_matches_a_float64_computation(scheme: str, loss_type: str) -> None:
    objective = flow(scheme=scheme, loss_type=loss_type, huber_c=0.2)
    noised, prediction, target = corrupt(objective, latents(2)), latents(5), latents(6)
    sigma, d = as_column(noised.sigmas_B), prediction.double() - target.double()
    c = (1 - 0.2) * (1 - sigma) ** 2 + 0.2  # 1 / (1 + noise-to-signal ratio) is the share of the latent
    arc = (d**2 + c**2).sqrt() - c
    error = {"l2": d**2, "l1": d.abs(), "huber": 2 * c * arc, "smooth_l1": 2 * arc}[loss_type]
    weight = {"sigma_sqrt": sigma**-2, "cosmap": 2 / (math.pi * ((1 - sigma) ** 2 + sigma**2))}.get(scheme, 1.0)
    loss = objective.loss(prediction, target, noised)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), error * weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("schedule", "threshold"), [("constant", 0.3), ("exponential", math.exp(math.log(0.3) * 0.8))])
def test_huber_loss_follows_constant_and_exponential_schedules(schedule: str, threshold: float) -> None:
    objective = flow(loss_type="huber", huber_schedule=schedule, huber_c=0.3).at_timestep(800)
    noised, prediction, target = corrupt(objective, latents(2)), latents(5), latents(6)
    d = prediction.double() - target.double()
    expected = 2 * threshold * ((d**2 + threshold**2).sqrt() - threshold)
    torch.testing.assert_close(objective.loss(prediction, target, noised).double(), expected, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_are_finite_at_both_ends_of_the_schedule() -> None:
    clean = latents(2)
    for timestep in (0, 999, 1000):
        objective = replace(flow("latent", "sigma_scaled", "sigma_sqrt", loss_type="huber"), timestep=timestep)
        noised = corrupt(objective, clean)
        output = latents(7).requires_grad_()
        loss = objective.loss(objective.estimate(output, noised), objective.target(noised), noised)
        loss.sum().backward()
        assert loss.isfinite().all() and output.grad is not None and output.grad.isfinite().all(), timestep


def test_the_loss_is_zero_without_noise() -> None:
    objective = flow("latent", "sigma_scaled", "sigma_sqrt").at_timestep(0)
    noised = corrupt(objective, latents(2))
    assert objective.loss(objective.estimate(latents(7), noised), objective.target(noised), noised).eq(0).all()


def test_ip_noise_gamma_affects_only_the_input() -> None:
    clean = latents(2)
    noised = corrupt(flow(ip_noise_gamma=0.25), clean)
    g = torch.Generator().manual_seed(3)
    noise, extra, sigmas = (
        torch.randn(B, C, H, W, generator=g),
        torch.randn(B, C, H, W, generator=g),
        torch.rand(B, generator=g),
    )
    exact = (1 - as_column(sigmas)) * clean.double() + as_column(sigmas) * (noise.double() + 0.25 * extra.double())
    torch.testing.assert_close(noised.latents_BCHW.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(flow().target(noised), noise - clean)


def test_random_ip_noise_strength_is_drawn_once_per_batch() -> None:
    clean = torch.zeros(B, C, H, W)
    objective = replace(flow(ip_noise_gamma=0.8, ip_noise_gamma_random_strength=True), timestep=1000)
    noised = corrupt(objective, clean)
    g = torch.Generator().manual_seed(3)
    noise, strength, extra = (
        torch.randn(B, C, H, W, generator=g),
        torch.rand((), generator=g),
        torch.randn(B, C, H, W, generator=g),
    )
    torch.testing.assert_close(noised.latents_BCHW, noise + 0.8 * strength * extra)


def test_timestep_limits_rescale_the_noise_levels_to_their_range() -> None:
    clean = torch.zeros(50_000, 1, 1, 1)
    noised = corrupt(flow(min_timestep=200, max_timestep=700), clean)
    inside = (noised.timesteps_B.double() - 200) / 500
    steps = torch.arange(50_000).double() / 50_000
    assert inside.min() >= 0 and inside.max() <= 1
    assert (inside.sort().values - steps).abs().max() < 1.95 / 50_000**0.5


def test_timesteps_rounded_for_the_denoiser_do_not_change_the_noise_level() -> None:
    exact, rounded = (
        corrupt(flow(tells_whole_timesteps=rounds), torch.zeros(500, 1, 1, 1)) for rounds in (False, True)
    )
    assert torch.equal(rounded.sigmas_B, exact.sigmas_B) and torch.equal(rounded.latents_BCHW, exact.latents_BCHW)
    assert torch.equal(rounded.timesteps_B, exact.timesteps_B.floor()) and not torch.equal(
        rounded.timesteps_B, exact.timesteps_B
    )


def test_whole_timesteps_stay_below_the_upper_limit() -> None:
    noised = corrupt(flow(min_timestep=3, max_timestep=7, has_whole_timesteps=True), torch.zeros(4000, 1, 1, 1))
    assert noised.timesteps_B.unique().tolist() == [3, 4, 5, 6]
    counts = noised.timesteps_B.long().bincount()[3:].double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3, "the 99.9 % point of chi-square with 3 degrees of freedom"
    assert corrupt(flow(has_whole_timesteps=True), torch.zeros(4000, 1, 1, 1)).timesteps_B.max() <= 999


def test_a_level_of_exactly_1_is_the_last_whole_timestep_of_the_range() -> None:
    objective = replace(flow(has_whole_timesteps=True, max_timestep=700), draw_levels=lambda _: torch.ones(3))
    assert corrupt(objective, latents(4)[:3]).timesteps_B.tolist() == [699.0] * 3


def test_at_timestep_fixes_the_noise_level() -> None:
    for has_whole_timesteps in (True, False):
        noised = corrupt(flow(has_whole_timesteps=has_whole_timesteps).at_timestep(400), latents(2))
        assert noised.timesteps_B.tolist() == [400.0] * B
        assert noised.sigmas_B.tolist() == pytest.approx([0.4] * B)


def test_invalid_limits_and_huber_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="--max_timestep is 1001"):
        flow(max_timestep=1001)
    with pytest.raises(ValueError, match=r"--huber_c is 0\.0"):
        flow(loss_type="huber", huber_c=0.0)


def build_with_warnings(
    caplog: pytest.LogCaptureFixture, prediction: str = "raw", **settings: Any
) -> tuple[FlowMatching, str]:
    weighting = {k: settings.pop(k) for k in list(settings) if k in vars(FlowWeightingOptions())}
    with caplog.at_level(logging.WARNING):
        objective = build_sampled_flow(
            SimpleNamespace(
                noise=NoiseOptions(),
                loss=LossOptions(),
                flow_sampling=FlowSamplingOptions(**settings),
                flow_weighting=FlowWeightingOptions(**weighting),
            ),
            prediction,
        )
    return objective, caplog.text


def test_sigma_scaled_is_used_but_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    objective, warned = build_with_warnings(caplog, "sigma_scaled", weighting_scheme="cosmap")
    assert "--model_prediction_type sigma_scaled converts the output" in warned and "raw" in warned
    assert (objective.prediction_type, objective.target_kind) == ("sigma_scaled", "noise - latent")
    assert objective.loss_scheme == "cosmap"


def test_raw_prediction_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    objective, warned = build_with_warnings(caplog, "raw")
    assert not warned and objective.loss_scheme == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting_scheme": "mode", "timestep_sampling": "sigmoid"}, "--weighting_scheme mode has no effect with"),
        ({"weighting_scheme": "cosmap"}, "--weighting_scheme cosmap has no effect: it requires --model_pred"),
    ],
)
def test_settings_without_effect_are_warned_about(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], message: str
) -> None:
    assert message in build_with_warnings(caplog, **settings)[1]


def test_a_kept_shape_is_the_distribution_cut_off_at_the_range() -> None:
    """The levels are those of the whole distribution that lie in the range, at 0.2 to 0.5."""
    noise = NoiseOptions(min_timestep=200, max_timestep=500)
    settings = SimpleNamespace(loss=LossOptions(), flow_weighting=FlowWeightingOptions())
    samplings = {keeps: FlowSamplingOptions("sigmoid", preserve_distribution_shape=keeps) for keeps in (False, True)}
    kept, scaled, whole = (
        build_sampled_flow(SimpleNamespace(**vars(settings), noise=options, flow_sampling=samplings[keeps]))
        .draw_timesteps(LevelDraws(50_000, H, W, torch.Generator().manual_seed(4)))
        .sort()
        .values
        for keeps, options in ((True, noise), (False, noise), (False, NoiseOptions()))
    )
    inside = whole[(whole >= 200) & (whole <= 500)]
    quantiles = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(kept.quantile(quantiles), inside.quantile(quantiles), rtol=0, atol=5)
    assert kept[0] >= 200 and kept[-1] <= 500
    assert (scaled.quantile(quantiles) - inside.quantile(quantiles)).abs().max() > 20


def test_a_range_that_is_never_drawn_is_an_error() -> None:
    sampling = FlowSamplingOptions("shift", discrete_flow_shift=1e6, preserve_distribution_shape=True)
    options = SimpleNamespace(
        noise=NoiseOptions(max_timestep=10),
        loss=LossOptions(),
        flow_sampling=sampling,
        flow_weighting=FlowWeightingOptions(),
    )
    with pytest.raises(ValueError, match=r"--preserve_distribution_shape.*--max_timestep 10; widen the range"):
        build_sampled_flow(options).draw_timesteps(LevelDraws(2, H, W, torch.Generator().manual_seed(4)))
