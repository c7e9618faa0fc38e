"""Pipelines with schedulers and settings that their publishers do not use: trained right, or refused with a reason."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.convention import Line
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.watch import Refused, Watched
from tests.any_pipeline.test_convention import SIZE, compare_with_float64
from tests.any_pipeline.test_every_start import prepare, require_right
from tests.hiding import lazily
from tests.tiers import first_is_fast
from tests.tiny.pipelines import build_tiny_pipeline, watch_pipeline

diffusers = lazily("diffusers")

SD, PIXART, FLUX = "StableDiffusionPipeline", "PixArtSigmaPipeline", "FluxPipeline"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
V = {"prediction_type": "v_prediction"}
LEVELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "300 timesteps": (SD, "DDIMScheduler", {"num_train_timesteps": 300, "clip_sample": False}),
    "betas of a sigmoid": (SD, "DDPMScheduler", {"beta_schedule": "sigmoid"}),
    "cosine": (PIXART, "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "thresholding": True}),
    "steps of Runge and Kutta": (SD, "PNDMScheduler", {**BETAS, "skip_prk_steps": False}),
    "without signal at the end": (
        SD, "EulerDiscreteScheduler", {**BETAS, **V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "Karras": (
        SD, "DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
    "with a step of other arguments": (SD, "CogVideoXDPMScheduler", BETAS),
    "shifted": (
        PIXART, "CogVideoXDDIMScheduler", {**BETAS, **V, "snr_shift_scale": 3.0, "rescale_betas_zero_snr": True}),
}  # fmt: skip
RANDOM: Mapping[str, tuple[str, str, dict[str, Any], Line]] = {
    "sde-dpmsolver++": (
        PIXART, "DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}, Line(1000.0, 0.0, "cut")),
    "stochastic_sampling": (
        FLUX, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True, "shift": 3.0}, Line(1.0, 0.0)),
}  # fmt: skip


def build(name: str, scheduler: str, config: Mapping[str, Any]) -> Any:
    pipe = build_tiny_pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    return pipe


def abar_in_float64(config: Mapping[str, Any]) -> Tensor:
    """Return the share of the image in each level's variance, as the papers of these schedules have it."""
    count, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    place_T = torch.arange(count, dtype=torch.float64)
    share_T = place_T / (count - 1)
    if config["beta_schedule"] == "scaled_linear":
        beta_T = (first**0.5 + (last**0.5 - first**0.5) * share_T) ** 2
    elif config["beta_schedule"] == "sigmoid":
        beta_T = first + (last - first) * torch.sigmoid(12 * share_T - 6)
    elif config["beta_schedule"] == "squaredcos_cap_v2":
        after, before = (torch.cos((x / count + 0.008) / 1.008 * math.pi / 2) ** 2 for x in (place_T + 1, place_T))
        beta_T = (1 - after / before).clamp(max=0.999)
    else:
        beta_T = first + (last - first) * share_T
    abar_T = (1 - beta_T).cumprod(0)
    if scale := config.get("snr_shift_scale"):
        abar_T = abar_T / (scale + (1 - scale) * abar_T)
    if config.get("rescale_betas_zero_snr"):
        root_T = abar_T.sqrt()
        abar_T = ((root_T - root_T[-1]) * root_T[0] / (root_T[0] - root_T[-1])) ** 2
    return abar_T


@pytest.mark.parametrize("case", first_is_fast(sorted(LEVELS)))
def test_noise_levels_and_the_target_are_those_of_the_schedule_in_float64(case: str) -> None:
    name, scheduler, config = LEVELS[case]
    pipe = build(name, scheduler, config)
    _, later, first = prepare(pipe)
    expected = abar_in_float64(pipe.scheduler.config)
    for part in (later, first):
        require_right(part)
        objective: Any = part.objective
        torch.testing.assert_close(objective.abar_T, expected, rtol=1e-5, atol=1e-6)
        assert objective.predicts_velocity == (config.get("prediction_type") == "v_prediction")
        assert part.predict.convention.lines == {("timestep",): Line(1.0, 0.0)}


def measured(name: str, scheduler: str, config: Mapping[str, Any]) -> tuple[Watched, Any, Any]:
    watched = watch_pipeline(build(name, scheduler, config))
    return watched, *measure(watched, SIZE)


@pytest.mark.parametrize("case", first_is_fast(sorted(RANDOM)))
def test_a_random_scheduler_of_a_flow_is_trained_as_a_step_in_float64(case: str) -> None:
    name, scheduler, config, line = RANDOM[case]
    watched, convention, maps = measured(name, scheduler, config)
    require_exact(check(watched, convention, maps))
    assert (convention.mix, convention.target) == ("flow", "noise - latent")
    assert convention.replaces_scheduler and convention.lines == {("timestep",): line}
    compare_with_float64(lambda: build(name, scheduler, config), watched, convention, maps, steps=4)


def test_timesteps_other_than_the_places_of_their_levels_are_refused() -> None:
    config = {**BETAS, **V, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 120.0}
    for karras in (False, True):
        with pytest.raises(Refused, match="its EulerDiscreteScheduler tells the denoiser"):
            measured(SD, "EulerDiscreteScheduler", {**config, "use_karras_sigmas": karras})


@pytest.mark.parametrize(
    ("name", "scheduler", "config", "sentence"),
    [
        (PIXART, "FlowMatchEulerDiscreteScheduler", {}, "it does not work with its FlowMatchEulerDiscreteScheduler"),
        (FLUX, "EulerDiscreteScheduler", {}, "it does not work with its EulerDiscreteScheduler"),
        (SD, "IPNDMScheduler", {}, "no known objective makes a step of its IPNDMScheduler exact"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_named_with_what_to_use(
    name: str, scheduler: str, config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(Refused, match=f"{sentence}; use the scheduler_config.json of its publisher"):
        measured(name, scheduler, config)
