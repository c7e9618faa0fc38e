"""The noise schedule, compared with diffusers and literal values."""

import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.schedules import ddpm_abar, scaled_linear_betas, sigmas_of, snr_of


def reference(**settings: bool) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def test_the_table_matches_stable_diffusion() -> None:
    abar_T = ddpm_abar(zero_terminal_snr=False)
    assert abar_T.dtype == torch.float64
    assert abar_T.shape == (1000,)
    # Read from a scheduler of SD 1.5, float32.
    for index, value in ((0, 0.9991499781608582), (499, 0.27766942977905273), (999, 0.00466009508818388)):
        assert abar_T[index].item() == pytest.approx(value, rel=2e-6)


def test_betas_and_table_agree_with_diffusers() -> None:
    torch.testing.assert_close(scaled_linear_betas().float(), reference().betas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ddpm_abar(False).float(), reference().alphas_cumprod, rtol=5e-6, atol=0)


def test_zero_terminal_snr_agrees_with_diffusers_and_keeps_the_first_value() -> None:
    abar_T = ddpm_abar(zero_terminal_snr=True)
    assert abar_T[-1] == 0
    assert abar_T[0].item() == pytest.approx(ddpm_abar(False)[0].item(), rel=1e-14)
    assert (abar_T.diff() < 0).all()
    # diffusers goes back to float32 betas and multiplies them again, which loses digits near the end.
    theirs = reference(rescale_betas_zero_snr=True).alphas_cumprod.double()
    torch.testing.assert_close(abar_T[:-1], theirs[:-1], rtol=2e-3, atol=1e-7)


def test_snr_and_sigma_agree() -> None:
    abar_T = ddpm_abar(zero_terminal_snr=True)
    torch.testing.assert_close(sigmas_of(abar_T)[:-1] ** -2, snr_of(abar_T)[:-1], rtol=1e-12, atol=0)
    assert sigmas_of(abar_T)[-1] == torch.inf
    assert snr_of(abar_T)[-1] == 0
    assert snr_of(ddpm_abar(False))[0].item() == pytest.approx(0.99915 / 0.00085, rel=1e-9)
