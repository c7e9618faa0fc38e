"""A measured pipeline as the trainer sees it: latents, prediction and objective."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.check import TOLERANCE, difference, encode_raw
from library.architectures.any_pipeline.conditioning import CapturedText, fill_arguments
from library.architectures.any_pipeline.convention import PROMPTS, Convention
from library.architectures.any_pipeline.experts import Expert
from library.architectures.any_pipeline.maps import SizeMaps, read_maps
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.trees import Unequal, join_rows, join_values, move, split_rows, take_row
from library.architectures.any_pipeline.watch import Answers, Refused, Size, Trace, Watched, bind, is_fake
from library.diffusion.flow import FlowMatching
from library.diffusion.objective import DDPM
from library.diffusion.schedules import snr_of
from library.diffusion.timesteps import (
    LevelDraws,
    LevelSampler,
    build_level_sampler,
    resolve_timestep_range,
    shift_sigmas,
    takes_offset,
)
from library.diffusion.weighting import check_huber
from library.protocols import LatentSpec, Objective
from library.types import Batch, Conditioning, Noised

NUM_STEPS = 30  # of a pipeline without a default


@dataclass(frozen=True)
class PipelineLatents:
    """Latents of the pipeline's VAE; the cache holds posterior samples as the VAE gives them."""

    spec: LatentSpec
    convention: Convention

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Return samples of the posterior, or its mode without generators; float32."""
        c = self.convention
        shape = (c.latent_shape[1], *(side // c.downscale for side in pixels_BCHW.shape[-2:]))
        noises = None if generators is None else torch.stack([torch.randn(shape, generator=g) for g in generators])
        return encode_raw(vae, pixels_BCHW, len(c.latent_shape), noises).reshape(len(pixels_BCHW), *shape)

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return self.convention.latents_of(latents_BCHW)

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decode latents to images, float32, about -1..1."""
        model: Any = vae
        raw = self.convention.raw_of(latents_BCHW).to(next(iter(vae.parameters())))
        raw = raw.unsqueeze(2) if len(self.convention.latent_shape) == 5 else raw
        others, options = move(self.convention.decoding, raw.device, raw.dtype)
        pixels: Tensor = model.decode(raw, *others, **options).sample
        return (pixels[:, :, 0] if pixels.ndim == 5 else pixels).float()


class Repeated(nn.Module):
    """A denoiser that computes a sample as often as a batch has samples, as T-LoRA expects of every call."""

    def __init__(self, denoiser: nn.Module, count: int) -> None:
        super().__init__()
        self.denoiser, self.count = denoiser, count

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the denoiser, on which pipelines register hooks; "" is this module."""
        return self.denoiser.get_submodule(target) if target else self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.count == 1:
            return self.denoiser(*args, **kwargs)
        named = bind(self.denoiser, args, kwargs)
        return take_row(self.denoiser(**join_rows([named] * self.count, named, pads=False)), 0, self.count)


@dataclass(frozen=True, eq=False)
class PipelinePredict:
    """The call of the denoiser. What belongs to a size is read from the pipeline at the first batch of that size."""

    watched: Watched
    convention: Convention
    text: CapturedText
    check: Callable[["PipelinePredict", Repeated, SizeMaps, Size], None] = lambda *_: (
        None
    )  # of the denoiser, at each size
    ready: dict[tuple[Size, torch.device], SizeMaps] = field(default_factory=dict)
    expected: list[Size] = field(default_factory=list)  # the sizes of a run that are checked before its first step

    shifts: dict[Size, float] = field(default_factory=dict)

    def expect_sizes(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Check the tallest and the widest of these (width, height) before the first step."""
        ratios = sorted(set(sizes), key=lambda size: size[0] / size[1])
        self.expected[:] = dict.fromkeys(size[::-1] for size in (*ratios[:1], *ratios[-1:]))

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        """Return the prediction that the pipeline would give its scheduler, in the layout of the latents."""
        c, device, count = self.convention, noised.latents_BCHW.device, len(noised.latents_BCHW)
        height, width = (side * c.downscale for side in noised.latents_BCHW.shape[-2:])
        if is_fake(denoiser):  # a planned run has not begun, and begins with the check
            return self.predict(denoiser, self.prepare((height, width), device), noised, conditioning)
        sizes = [*([] if self.ready else self.expected), (height, width)]
        for size in dict.fromkeys(size for size in sizes if (size, device) not in self.ready):
            maps = self.prepare(size, device)
            self.check(self, Repeated(denoiser, count if c.takes_batches else 1), maps, size)
            self.ready[size, device] = maps
        return self.predict(denoiser, self.ready[(height, width), device], noised, conditioning)

    def predict(self, denoiser: nn.Module, maps: SizeMaps, noised: Noised, conditioning: Conditioning) -> Tensor:
        """Return the prediction for latents of the size of the maps."""
        c, latents_BCHW = self.convention, noised.latents_BCHW.float()
        levels_B = (noised.sigmas_B if c.mix == "flow" else noised.timesteps_B).float()
        rows = [
            fill_arguments(c, maps, self.text.restore(conditioning, place), sample_N, levels_B[place : place + 1])
            for place, sample_N in enumerate(maps.to_sample(latents_BCHW.flatten(1)))
        ]
        outputs = self.call(denoiser, rows, maps.kwargs)
        prediction_BN = torch.cat([maps.out(output.float()[None]) for output in outputs])
        return maps.to_latents(prediction_BN).reshape(latents_BCHW.shape)

    def call(self, denoiser: nn.Module, rows: Sequence[Any], example: Any) -> list[Tensor]:
        """Return the denoiser's output for each sample, in one call where it gives the same."""
        if len(rows) > 1 and self.convention.takes_batches:
            try:
                return split_rows(denoiser(**join_rows(rows, example, self.convention.pads)), len(rows))
            except Unequal:  # captions of different lengths, and no mask
                pass
        return [join_values(denoiser(**row)) for row in rows]

    @torch.no_grad()
    def prepare(self, size: Size, device: torch.device) -> SizeMaps:
        """Read the maps of a size from the pipeline, without running the denoiser."""
        c = self.convention
        with self.watched.real_tensors():
            maps = read_maps(self.watched, c, size, device)
            ones = torch.ones(maps.decode.shape[1], *maps.decode.shape[-2:])
            if difference(c.raw_of(ones), maps.decode.scale_M + maps.decode.offset_M) > TOLERANCE:
                raise Refused(f"{c.pipeline} scales the latents of {size} otherwise than those of {c.size}")
        return maps

    def draw_first(self, size: Size, steps: int = 2) -> Trace:
        """Draw until the denoiser's first call."""
        c = self.convention
        return self.watched.draw(PROMPTS[0], size, Answers(stops_at=0), steps=steps, **c.extra)

    def shift(self, size: Size) -> float:
        """Return how far the pipeline shifts the noise levels of a size toward noise, at its default number of steps,
        which some pipelines' shift follows. It is read once for each size."""
        if size not in self.shifts:
            self.shifts[size] = self.read_shift(size)
        return self.shifts[size]

    def read_shift(self, size: Size) -> float:
        mu, config = self.draw_default(size).mu, self.watched.pipe.scheduler.config
        if mu is None or not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or config.get("flow_shift") or 1.0)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def draw_default(self, size: Size) -> Trace:
        """Draw with the pipeline's default number of steps until the denoiser's first call."""
        option = self.watched.options.get("num_inference_steps")
        default = None if option is None else option.default
        return self.draw_first(size, default if isinstance(default, int) else NUM_STEPS)


def build_objective(options: PipelineOptions, predict: PipelinePredict, expert: Expert | None = None) -> Objective:
    """Build the measured objective. Raises UserError for a target that is not trained, and for invalid timesteps.

    The levels of an `expert` are those of the whole model, cut off at its boundary.
    """
    noise = options.noise if expert is None else expert.narrow(options.noise)
    target, pipeline = predict.convention.target, predict.convention.pipeline
    if predict.convention.mix == "flow":
        if target not in ("noise - latent", "latent - noise", "latent"):
            raise Refused(f"{pipeline} predicts {target} of a flow, which is not trained here")
        sampling, weighting = options.flow_sampling, options.flow_weighting
        draw = build_level_sampler(sampling, weighting)
        if sampling.timestep_sampling == "pipeline":
            draw = build_level_sampler(replace(sampling, timestep_sampling="sigmoid", sigmoid_scale=1.0), weighting)
            draw = partial(draw_like_pipeline, predict, draw)
        return FlowMatching(
            noise,
            options.loss,
            draw,
            target,
            "raw",
            weighting.weighting_scheme,
            takes_offset=takes_offset(weighting, sampling),
            num_strata=sampling.num_timestep_buckets or 1,
            keeps_shape=sampling.preserve_distribution_shape or expert is not None,
        )
    if target not in ("noise", "velocity"):
        raise Refused(f"{pipeline} predicts {target} of a DDPM schedule, which is not trained here")
    abar_T = predict.watched.pipe.scheduler.alphas_cumprod.double()
    timesteps = resolve_timestep_range(noise, len(abar_T))
    check_huber(options.loss)
    # The loss weights of a schedule that ends in pure noise would be 0 / 0 there.
    snr_T = snr_of(abar_T.clamp(min=1e-6))
    return DDPM(abar_T, snr_T, target == "velocity", *timesteps, noise, options.loss)


def draw_like_pipeline(predict: PipelinePredict, draw: LevelSampler, draws: LevelDraws) -> Tensor:
    """Draw noise levels with the pipeline's shift."""
    downscale = predict.convention.downscale
    return shift_sigmas(draw(draws), predict.shift((draws.latent_height * downscale, draws.latent_width * downscale)))
