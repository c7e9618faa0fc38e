"""Samplers, their schedules, and guidance."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from library.diffusion.guidance import apply_guidance
from library.diffusion.objective import build_ddpm
from library.diffusion.samplers import FlowSampler, Sampler, adams_bashforth, betas_of, build_ddpm_sampler, even_sigmas
from library.diffusion.schedules import LATENT_DIFFUSION, BetaSchedule, abar_of, sigmas_of, snr_of
from library.options.output.sampler_names import ALIASES, SAMPLERS
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Conditioning, Prompt
from tests.hiding import lazily
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64

diffusers = lazily("diffusers")


def sample(sampler: Sampler, clean_BCHW: Tensor, seed: int = 0) -> Tensor:
    """Sample with a perfect denoiser, which knows the clean latents and predicts the exact noise in its input."""
    generator = torch.Generator().manual_seed(seed)
    x_BCHW = sampler.start(torch.randn(clean_BCHW.shape, generator=generator))
    for n, level in enumerate(sampler.levels):
        shown_BCHW = sampler.denoiser_input(x_BCHW, n)
        scale = (level.sigma**2 + 1) ** 0.5  # shown = (clean + sigma * noise) / scale
        noise_BCHW = (shown_BCHW * scale - clean_BCHW) / level.sigma
        x_BCHW = sampler.step(noise_BCHW, x_BCHW, n, generator)
    return x_BCHW


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_of_a_sampler_gives_the_same_scheduler(name: str) -> None:
    samplers = [
        build_ddpm_sampler(n, 4, predicts_velocity=False, zero_terminal_snr=False) for n in (name, ALIASES[name])
    ]
    assert samplers[0].levels == samplers[1].levels and type(samplers[0]) is type(samplers[1])


@pytest.mark.parametrize("num_steps", [3, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_leads_to_the_clean_latents(name: str, num_steps: int) -> None:
    """The noise of a sampler's last level remains: sigma is 0.04 at timestep 1 and 0.03 at timestep 0."""
    clean_BCHW = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    sampler = build_ddpm_sampler(name, num_steps, predicts_velocity=False, zero_terminal_snr=False)
    error_BCHW = sample(sampler, clean_BCHW) - clean_BCHW
    ends_at_noise = name in ("ddim", "pndm", "dpmsolver")
    assert error_BCHW.std() < (0.05 if ends_at_noise else 1e-3)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim", "pndm")])
def test_one_step_is_enough_for_a_perfect_denoiser(name: str) -> None:
    """DDIM and PNDM are excluded: they count timesteps from the clean end, so their one step is timestep 1."""
    clean_BCHW = torch.ones(1, 4, 2, 2)
    sampler = build_ddpm_sampler(name, 1, predicts_velocity=False, zero_terminal_snr=False)
    assert (sample(sampler, clean_BCHW) - clean_BCHW).abs().max() < 0.15


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_with_zero_terminal_snr_starts_at_the_last_timestep(name: str) -> None:
    sampler = build_ddpm_sampler(name, 8, predicts_velocity=True, zero_terminal_snr=True)
    assert sampler.levels[0].timestep == 999
    x_BCHW = sampler.start(torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2)))
    for n in range(len(sampler.levels)):
        velocity_BCHW = 0.1 * sampler.denoiser_input(x_BCHW, n)
        x_BCHW = sampler.step(velocity_BCHW, x_BCHW, n, torch.Generator().manual_seed(n))
    assert x_BCHW.isfinite().all()


@pytest.mark.parametrize("velocity", [False, True])
@pytest.mark.parametrize("num_steps", [2, 7, 10, 40])
def test_ancestral_steps_match_diffusers(num_steps: int, velocity: bool) -> None:
    """The tolerance allows for diffusers' float32 tables, which keep five digits of 1 - abar near abar 1."""
    import diffusers

    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction" if velocity else "epsilon",
    )
    scheduler.set_timesteps(num_steps)
    ours = build_ddpm_sampler("ddpm", num_steps, predicts_velocity=velocity, zero_terminal_snr=False)
    assert [level.timestep for level in ours.levels] == scheduler.timesteps.tolist()
    x_BCHW = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(4))
    for n, timestep in enumerate(scheduler.timesteps):
        output_BCHW = torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(n))
        theirs = scheduler.step(output_BCHW, timestep, x_BCHW, generator=torch.Generator().manual_seed(9)).prev_sample
        actual = ours.step(output_BCHW, x_BCHW, n, torch.Generator().manual_seed(9))
        torch.testing.assert_close(actual, theirs, rtol=1e-4, atol=1e-4)
        x_BCHW = theirs


@pytest.mark.parametrize("num_steps", [3, 10])
def test_ancestral_sampling_with_zero_terminal_snr_starts_at_the_last_timestep(num_steps: int) -> None:
    """A perfect denoiser leads to the clean latents whatever noise is added in between."""
    ours = build_ddpm_sampler("ddpm", num_steps, predicts_velocity=True, zero_terminal_snr=True)
    assert ours.levels[0].timestep == 999 and len(ours.levels) == num_steps
    clean_BCHW = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    x_BCHW = ours.start(torch.randn(clean_BCHW.shape, generator=generator))
    for n, level in enumerate(ours.levels):
        abar = 1 / (1 + level.sigma**2)
        noise_BCHW = (x_BCHW - abar**0.5 * clean_BCHW) / (1 - abar) ** 0.5
        x_BCHW = ours.step(abar**0.5 * noise_BCHW - (1 - abar) ** 0.5 * clean_BCHW, x_BCHW, n, generator)
    assert (x_BCHW - clean_BCHW).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a"])
def test_ancestral_noise_comes_from_the_generator_of_the_image(name: str) -> None:
    clean_BCHW = torch.zeros(1, 4, 4, 4)
    first, same, other = (
        sample(build_ddpm_sampler(name, 3, predicts_velocity=False, zero_terminal_snr=False), clean_BCHW, seed)
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_multistep_weights_on_even_steps_match_the_textbook() -> None:
    """Adams-Bashforth of order 4: (55, -59, 37, -9) / 24 of the step."""
    weights = adams_bashforth([0.0, 0.5, 1.0, 1.5, 2.0], 3, 4)
    torch.testing.assert_close(
        torch.tensor(weights, dtype=torch.float64),
        0.5 * torch.tensor([55, -59, 37, -9], dtype=torch.float64) / 24,
        **FLOAT64,
    )


def test_multistep_integrates_a_cubic_slope_exactly_on_uneven_steps() -> None:
    positions = [4.0, 3.1, 2.5, 1.2, 0.7]
    weights = adams_bashforth(positions, 3, 4)
    total = sum(w * (x**3 - 2 * x) for w, x in zip(weights, positions[3::-1], strict=True))
    exact = [x**4 / 4 - x**2 for x in positions]
    assert total == pytest.approx(exact[4] - exact[3], rel=1e-12)


def test_betas_are_recovered_from_their_cumulative_product() -> None:
    torch.testing.assert_close(betas_of(abar_of(LATENT_DIFFUSION.betas())), LATENT_DIFFUSION.betas(), **FLOAT64)
    assert betas_of(LATENT_DIFFUSION.abar(zero_terminal_snr=True))[-1] == 1


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_a_straight_flow_ends_at_the_clean_latents(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(5)
    clean_BCHW, noise_BCHW = torch.randn(2, 1, 4, 4, 4, generator=generator)
    sampler = FlowSampler(even_sigmas(num_steps))
    x_BCHW = sampler.start(noise_BCHW)
    for n, level in enumerate(sampler.levels):
        expected_BCHW = (1 - level.sigma) * clean_BCHW + level.sigma * noise_BCHW
        torch.testing.assert_close(sampler.denoiser_input(x_BCHW, n), expected_BCHW, **FLOAT32_SAME_MATH)
        x_BCHW = sampler.step(noise_BCHW - clean_BCHW, x_BCHW, n, generator)
    torch.testing.assert_close(x_BCHW, clean_BCHW, **FLOAT32_SAME_MATH)


def test_a_flow_sampler_uses_the_given_levels() -> None:
    sigmas_N = 3 * even_sigmas(4) / (1 + 2 * even_sigmas(4))
    levels = FlowSampler(sigmas_N).levels
    assert [level.sigma for level in levels] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert [level.timestep for level in levels] == pytest.approx([1000, 900, 750, 500])


# The noise schedule, compared with diffusers and literal values.


def reference(**settings: bool) -> Any:
    return diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def test_the_table_matches_stable_diffusion() -> None:
    abar_T = LATENT_DIFFUSION.abar(zero_terminal_snr=False)
    assert abar_T.dtype == torch.float64
    assert abar_T.shape == (1000,)
    # Read from a scheduler of SD 1.5, float32.
    for index, value in ((0, 0.9991499781608582), (499, 0.27766942977905273), (999, 0.00466009508818388)):
        assert abar_T[index].item() == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("schedule", [LATENT_DIFFUSION, BetaSchedule(1e-4, 0.02, "linear")])  # the second is PixArt's
def test_a_schedule_is_that_of_diffusers(schedule: BetaSchedule) -> None:
    theirs = diffusers.DDPMScheduler(**asdict(schedule))
    torch.testing.assert_close(schedule.betas().float(), theirs.betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.abar(False).float(), theirs.alphas_cumprod, rtol=5e-6, atol=0)
    assert build_ddpm(NoiseOptions(), LossOptions(), False, schedule).abar_T.equal(schedule.abar(False))
    sampler = build_ddpm_sampler("ddim", 10, predicts_velocity=False, zero_terminal_snr=False, schedule=schedule)
    expected = [float(((1 - a) / a).sqrt()) for a in theirs.alphas_cumprod[[int(t) for t, _ in sampler.levels]]]
    assert [sigma for _, sigma in sampler.levels] == pytest.approx(expected, rel=1e-4)  # theirs are float32


def test_zero_terminal_snr_agrees_with_diffusers_and_keeps_the_first_value() -> None:
    abar_T = LATENT_DIFFUSION.abar(zero_terminal_snr=True)
    assert abar_T[-1] == 0
    assert abar_T[0].item() == pytest.approx(LATENT_DIFFUSION.abar(False)[0].item(), rel=1e-14)
    assert (abar_T.diff() < 0).all()
    # diffusers goes back to float32 betas and multiplies them again, which loses digits near the end.
    theirs = reference(rescale_betas_zero_snr=True).alphas_cumprod.double()
    torch.testing.assert_close(abar_T[:-1], theirs[:-1], rtol=2e-3, atol=1e-7)


def test_snr_and_sigma_agree() -> None:
    abar_T = LATENT_DIFFUSION.abar(zero_terminal_snr=True)
    torch.testing.assert_close(sigmas_of(abar_T)[:-1] ** -2, snr_of(abar_T)[:-1], rtol=1e-12, atol=0)
    assert sigmas_of(abar_T)[-1] == torch.inf
    assert snr_of(abar_T)[-1] == 0
    assert snr_of(LATENT_DIFFUSION.abar(False))[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-9)


# Classifier-free guidance.

POSITIVE, NEGATIVE = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[1.0, 4.0]]]])


def prompt_of(**values: Any) -> Prompt:
    unset = dict.fromkeys(("sampler", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"))
    common = {"text": "a", "negative": "b", "width": 64, "height": 64, "seed": 1, "num_steps": 4, "scale": 2.0}
    return Prompt(**{**common, **unset, **values})  # type: ignore[arg-type]


def guide(progress: float = 0.5, **values: Any) -> tuple[Tensor, int]:
    """Return the guided prediction and the number of model calls."""
    calls = []

    def predict(conditioning: Conditioning) -> Tensor:
        calls.append(conditioning)
        return conditioning["x"]

    prediction = apply_guidance(predict, {"x": POSITIVE}, {"x": NEGATIVE}, prompt_of(**values), progress)
    return prediction, len(calls)


def test_guidance_moves_away_from_the_negative_prompt() -> None:
    assert guide()[0].flatten().tolist() == [5.0, -4.0]  # 1 + 2 * (3 - 1), 4 + 2 * (0 - 4)


def test_without_guidance_the_model_is_called_once() -> None:
    prediction, num_calls = guide(scale=1.0)
    assert num_calls == 1 and torch.equal(prediction, POSITIVE)


def test_guidance_ends_after_cfg_trunc_ratio_of_the_steps() -> None:
    assert guide(0.25, cfg_trunc_ratio=0.25)[1] == 2
    prediction, num_calls = guide(0.5, cfg_trunc_ratio=0.25)
    assert num_calls == 1 and torch.equal(prediction, POSITIVE)


def test_renorm_cfg_limits_the_norm_of_the_prediction() -> None:
    plain, limited, loose = (guide(renorm_cfg=limit)[0] for limit in (0.0, 1.0, 10.0))
    assert torch.equal(plain, loose)
    torch.testing.assert_close(limited.norm(), POSITIVE.norm(), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(limited / limited.norm(), plain / plain.norm(), **FLOAT32_SAME_MATH)
