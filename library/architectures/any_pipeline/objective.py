"""The training objective of a measured pipeline."""

import torch
from torch import Tensor

from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.training import PipelinePredict
from library.architectures.any_pipeline.watch import Refused
from library.diffusion.flow import FlowMatching
from library.diffusion.objective import DDPM
from library.diffusion.schedules import snr_of
from library.diffusion.timesteps import (
    NUM_TIMESTEPS,
    build_level_sampler,
    draw_moved_normal,
    resolve_timestep_range,
    shift_sigmas,
    takes_offset,
)
from library.diffusion.weighting import check_huber
from library.protocols import Objective


def build_objective(options: PipelineOptions, predict: PipelinePredict) -> Objective:
    """Build the measured objective. Raises UserError for a target that is not trained, and for invalid timesteps."""
    if predict.convention.mix == "flow":
        return build_flow(options, predict)
    target = predict.convention.target
    if target not in ("noise", "velocity"):
        raise Refused(f"{predict.convention.pipeline} predicts {target} of a DDPM schedule, which is not trained here")
    min_timestep, max_timestep = resolve_timestep_range(options.noise, NUM_TIMESTEPS)
    check_huber(options.loss)
    abar_T = predict.watched.pipe.scheduler.alphas_cumprod.double()
    # The loss weights of a schedule that ends in pure noise would be 0 / 0 there.
    snr_T = snr_of(abar_T.clamp(min=1e-6))
    return DDPM(abar_T, snr_T, target == "velocity", min_timestep, max_timestep, options.noise, options.loss)


def build_flow(options: PipelineOptions, predict: PipelinePredict) -> FlowMatching:
    sampling, weighting = options.flow_sampling, options.flow_weighting
    downscale, is_own = predict.convention.downscale, sampling.timestep_sampling == "pipeline"

    def draw_like_pipeline(
        num_samples: int,
        height: int,
        width: int,
        generator: torch.Generator,
        offsets_B: Tensor | None = None,
        uniforms_B: Tensor | None = None,
    ) -> Tensor:
        q_B = torch.sigmoid(draw_moved_normal(num_samples, generator, offsets_B, uniforms_B))
        return shift_sigmas(q_B, predict.shift((height * downscale, width * downscale)))

    return FlowMatching(
        options.noise,
        options.loss,
        draw_like_pipeline if is_own else build_level_sampler(sampling, weighting),
        "latent - noise" if predict.convention.target == "latent - noise" else "noise - latent",
        "raw",
        weighting.weighting_scheme,
        takes_offset=is_own or takes_offset(weighting, sampling),
        num_strata=sampling.num_timestep_buckets or 1,
        keeps_shape=sampling.preserve_distribution_shape,
    )
