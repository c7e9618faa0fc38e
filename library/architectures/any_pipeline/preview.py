"""Previews of a measured pipeline: its own noise levels and default settings."""

from typing import Any

from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.architectures.any_pipeline.watch import copy_scheduler
from library.diffusion.samplers import DdpmSampler, FlowSampler, Sampler
from library.protocols import Preview, PromptDefaults
from library.types import Prompt

SIDE = 1024  # of a preview whose pipeline has no default size
STEPS, SCALE = 30, 1.0  # of a pipeline without defaults


def build_preview(predict: PipelinePredict, codec: PipelineLatents) -> Preview:
    """Build the preview settings from the defaults of the pipeline's call."""
    options, pipe = predict.watched.options, predict.watched.pipe

    def default(name: str, kind: Any, otherwise: Any) -> Any:
        value = options[name].default if name in options else None
        return kind(value) if isinstance(value, int | float) else otherwise

    side = int(getattr(pipe, "default_sample_size", None) or SIDE // codec.spec.downscale) * codec.spec.downscale
    scale = "true_cfg_scale" if "true_cfg_scale" in options else "guidance_scale"
    guides = predict.convention.unconditional is not None
    return Preview(
        defaults=PromptDefaults(
            num_steps=default("num_inference_steps", int, STEPS),
            width=default("width", int, side),
            height=default("height", int, side),
            scale=default(scale, float, SCALE) if guides else SCALE,
            size_step=codec.spec.bucket_step,
        ),
        text=predict.text,
        predict=lambda prompt: predict,
        sampler=lambda prompt: build_sampler(predict, prompt),
    )


def build_sampler(predict: PipelinePredict, prompt: Prompt) -> Sampler:
    """Build a sampler on the noise levels of the pipeline's own scheduler."""
    if predict.convention.mix == "flow":
        sign = "latent - noise" if predict.convention.target == "latent - noise" else "noise - latent"
        return FlowSampler(predict.sigmas((prompt.height, prompt.width), prompt.num_steps), sign)
    scheduler = copy_scheduler(predict.watched.pipe.scheduler)
    scheduler.set_timesteps(prompt.num_steps)
    return DdpmSampler(scheduler, zero_terminal_snr=False)
