"""The noise schedule, compared with diffusers and literal values."""

from dataclasses import asdict

import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.objective import build_ddpm
from library.diffusion.samplers import build_ddpm_sampler
from library.diffusion.schedules import LATENT_DIFFUSION, BetaSchedule, sigmas_of, snr_of
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions


def reference(**settings: bool) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def test_the_table_matches_stable_diffusion() -> None:
    abar_T = LATENT_DIFFUSION.abar(zero_terminal_snr=False)
    assert abar_T.dtype == torch.float64
    assert abar_T.shape == (1000,)
    # Read from a scheduler of SD 1.5, float32.
    for index, value in ((0, 0.9991499781608582), (499, 0.27766942977905273), (999, 0.00466009508818388)):
        assert abar_T[index].item() == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize("schedule", [LATENT_DIFFUSION, BetaSchedule(1e-4, 0.02, "linear")])  # the second is PixArt's
def test_a_schedule_is_that_of_diffusers(schedule: BetaSchedule) -> None:
    theirs = DDPMScheduler(**asdict(schedule))
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
