"""Previews of a measured pipeline, drawn by the pipeline itself."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.convention import levels_of
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.architectures.any_pipeline.watch import Answers, Stop, copy_scheduler, setting
from library.diffusion.samplers import DdpmSampler, FlowSampler, Sampler, Velocity
from library.protocols import Preview, PromptDefaults
from library.types import Prompt

SIDE = 1024  # of a preview whose pipeline has no default size
STEPS, SCALE = 30, 1.0  # of a pipeline without defaults


Parts = Callable[[nn.Module], Mapping[str, nn.Module]]
"""Maps what is loaded as the denoiser to the pipeline's models that it is, by component."""


def build_preview(predict: PipelinePredict, codec: PipelineLatents, parts_of: Parts | None = None) -> Preview:
    """Build the preview settings from the defaults of the pipeline's call."""
    name = predict.convention.denoiser
    pipe, spec = predict.watched.pipe, codec.spec
    options = {name: option.default for name, option in predict.watched.options.items()}
    defaults = {name: value for name, value in options.items() if isinstance(value, int | float)}
    side = int(getattr(pipe, "default_sample_size", None) or SIDE // spec.downscale) * spec.downscale
    return Preview(
        defaults=PromptDefaults(
            num_steps=int(defaults.get("num_inference_steps", STEPS)),
            width=int(defaults.get("width", side)),
            height=int(defaults.get("height", side)),
            scale=float(defaults.get(scale_of(predict), SCALE)),
            size_step=spec.bucket_step,
        ),
        text=replace(predict.text, remembers=True),
        predict=lambda prompt: predict,
        sampler=lambda prompt: build_sampler(predict, prompt),
        draw=partial(draw, predict, parts_of or (lambda denoiser: {name: denoiser})),
    )


def scale_of(predict: PipelinePredict) -> str:
    """Return the pipeline's option for classifier-free guidance."""
    return "true_cfg_scale" if "true_cfg_scale" in predict.watched.options else "guidance_scale"


def draw(
    predict: PipelinePredict,
    parts_of: Parts,
    denoiser: nn.Module,
    prompt: Prompt,
    generator: torch.Generator,
    goes_on: Callable[[], bool],
) -> Tensor | None:
    """Draw with the pipeline and its own scheduler. Return latents, or None once `goes_on()` is False.

    Text encoders are loaded for a prompt that they have not seen in this run.
    """
    watched, c, size = predict.watched, predict.convention, (prompt.height, prompt.width)
    settings = {"generator": generator, scale_of(predict): prompt.scale, "negative_prompt": prompt.negative}
    extra: dict[str, Any] = {name: value for name, value in settings.items() if name in watched.options}

    def check_interruption(sample: Tensor) -> None:
        if not goes_on():
            raise Stop

    answers = Answers(samples=check_interruption)
    models = {**watched.models, **parts_of(denoiser)}
    with setting(watched, models=models), setting(watched.pipe, scheduler=watched.own_scheduler):
        trace = watched.draw(prompt.text, size, answers, steps=prompt.num_steps, **extra)
    if not trace.decoded:
        return None
    raw = trace.decoded[0]
    raw_BCHW = raw.reshape(raw.shape[0], raw.shape[1], *raw.shape[-2:]).to(next(iter(denoiser.parameters())).device)
    return c.latents_of(raw_BCHW)


def build_sampler(predict: PipelinePredict, prompt: Prompt) -> Sampler:
    """Build a sampler on the noise levels of the pipeline's own scheduler."""
    if predict.convention.mix == "flow":
        sign: Velocity = "latent - noise" if predict.convention.target == "latent - noise" else "noise - latent"
        predict.draw_first((prompt.height, prompt.width), prompt.num_steps)  # sets the levels for this size
        return FlowSampler(levels_of(predict.watched.pipe.scheduler)[:-1].double(), sign)
    scheduler = copy_scheduler(predict.watched.pipe.scheduler)
    scheduler.set_timesteps(prompt.num_steps)
    return DdpmSampler(scheduler, scheduler.alphas_cumprod.double())
