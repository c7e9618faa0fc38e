"""A measured pipeline as the trainer sees it: latents, prediction and noise levels."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.any_pipeline.check import TOLERANCE, difference, encode_raw, with_level
from library.architectures.any_pipeline.conditioning import CapturedText
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.maps import Map, SizeMaps, read_maps
from library.architectures.any_pipeline.trees import (
    Path,
    empty_like,
    have_equal_shapes,
    join_values,
    leaves,
    move,
    replace_leaves,
    split_rows,
    stack_rows,
)
from library.architectures.any_pipeline.watch import Answers, Refused, Size, Watched
from library.protocols import LatentSpec
from library.types import Batch, Conditioning, Noised

logger = logging.getLogger(__name__)

MOST_ERROR_IN_16_BITS = 0.02  # of a prediction, relative to its largest value


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
        raw = encode_raw(vae, pixels_BCHW, len(c.pixel_shape), noises)
        return raw.reshape(len(pixels_BCHW), *shape)

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return self.convention.latents_of(latents_BCHW)

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decode latents to images, float32, about -1..1."""
        model: Any = vae
        like, raw = next(iter(vae.parameters())), self.convention.raw_of(latents_BCHW)
        if len(self.convention.pixel_shape) == 5:
            raw = raw.unsqueeze(2)
        pixels: Tensor = model.decode(raw.to(like.device, like.dtype)).sample
        return (pixels[:, :, 0] if pixels.ndim == 5 else pixels).float()


@dataclass(frozen=True, eq=False)
class ReadySize:
    """Maps and tables of predictions for one size of the image, on the denoiser's device."""

    maps: SizeMaps
    into: Map  # latents -> the denoiser's argument
    out: Map  # the denoiser's output -> prediction
    kwargs: Any


@dataclass(frozen=True, eq=False)
class PipelinePredict:
    """The call of the denoiser. What belongs to a size is read from the pipeline at the first batch of that size."""

    watched: Watched
    convention: Convention
    text: CapturedText
    ready: dict[tuple[Size, torch.device], ReadySize] = field(default_factory=dict)

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        """Return the prediction that the pipeline would give its scheduler, in the layout of the latents."""
        c, latents_BCHW = self.convention, noised.latents_BCHW.float()
        if not self.ready:
            require_same_prediction(self, denoiser)
        height, width = (side * c.downscale for side in latents_BCHW.shape[-2:])
        size = self.prepare(denoiser, (height, width))
        levels_B = noised.sigmas_B if c.mix == "flow" else noised.timesteps_B
        arguments_BN = size.into(latents_BCHW.flatten(1))
        texts = [self.text.restore(conditioning, place) for place in range(len(arguments_BN))]
        rows = [
            self.fill(size, argument_N, levels_B[place : place + 1].float(), texts[place])
            for place, argument_N in enumerate(arguments_BN)
        ]
        if len(rows) > 1 and c.takes_batches and have_equal_shapes(texts):
            outputs = split_rows(denoiser(**stack_rows(rows)), len(rows))
        else:
            outputs = [join_values(denoiser(**row)) for row in rows]
        return torch.cat([size.out(output.float()[None]) for output in outputs]).reshape(latents_BCHW.shape)

    def fill(self, size: ReadySize, argument_N: Tensor, level_1: Tensor, text: dict[Path, Any]) -> Any:
        """Return the arguments of one sample."""
        given = with_level(self.convention, size.maps, size.kwargs, level_1)
        return replace_leaves(given, {**text, self.convention.latents: argument_N.reshape(size.maps.into.shape)})

    @torch.no_grad()
    def prepare(self, denoiser: nn.Module, sides: Size) -> ReadySize:
        """Read the maps of a size at its first use, which runs the denoiser once."""
        c, device = self.convention, self.device(denoiser)
        if (sides, device) in self.ready:
            return self.ready[sides, device]
        # Adapters may draw random numbers, which a resumed run must not draw anew.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trace = self.watched.draw(c.prompts[0], sides, Answers(stops_at=0), **c.extra)
            output = denoiser(**move(trace.calls[0].kwargs, device))
        self.ready[sides, device] = self._read_size(sides, empty_like(output), device)
        return self.ready[sides, device]

    def _read_size(self, sides: Size, template: Any, device: torch.device) -> ReadySize:
        c = self.convention
        maps = read_maps(self.watched, c, sides, template)
        ones = torch.ones(maps.decode.shape[1], *maps.decode.shape[-2:])
        if difference(c.raw_of(ones), maps.decode.scale_M + maps.decode.offset_M) > 1e-4:
            raise Refused(f"{c.pipeline} scales the latents of {sides} otherwise than those of {c.size}")
        into, out = maps.latents_into().on(device), maps.out_latents().on(device)
        return ReadySize(maps, into, out, move(maps.kwargs, device))

    @staticmethod
    def device(denoiser: nn.Module) -> torch.device:
        return next(iter(denoiser.parameters())).device

    def sigmas(self, sides: Size, steps: int) -> Tensor:
        """Return the noise levels at which the pipeline draws an image of this size."""
        self.watched.draw(self.convention.prompts[0], sides, Answers(stops_at=0), steps=steps, **self.convention.extra)
        sigmas: Tensor = self.watched.pipe.scheduler.sigmas
        return sigmas[:-1].double()

    def shift(self, sides: Size) -> float:
        """Return how far the pipeline shifts the noise levels of a size toward noise."""
        trace = self.watched.draw(self.convention.prompts[0], sides, Answers(stops_at=0), **self.convention.extra)
        config = self.watched.pipe.scheduler.config
        if trace.mu is None:
            return float(config.get("shift") or 1.0)
        return trace.mu if config.get("time_shift_type") == "linear" else math.exp(trace.mu)


def require_same_prediction(predict: PipelinePredict, denoiser: nn.Module) -> None:
    """Check the prediction of the denoiser as it trains against the pipeline's own call of it, and log the result.

    Raises Refused if they differ by more than rounding.
    """
    begun, is_rounded = time.monotonic(), torch.is_autocast_enabled(predict.device(denoiser).type)
    error, most = check_again(predict, denoiser), MOST_ERROR_IN_16_BITS if is_rounded else TOLERANCE
    if not error <= most:
        raise Refused(
            f"{predict.convention.pipeline}: the prediction of the loaded denoiser differs from the pipeline's own by "
            f"{error:.2g} of its largest value (at most {most:g} is accepted)"
        )
    seconds = time.monotonic() - begun
    logger.info("the prediction agrees with the pipeline's own (%.1g), checked in %.1f s", error, seconds)


def check_again(predict: PipelinePredict, denoiser: nn.Module) -> float:
    """Return the error of our prediction on the loaded denoiser against the pipeline's own call of it.

    The pipeline draws with the recorded text; two passes at the smallest size.
    """
    c, watched = predict.convention, predict.watched
    size = predict.prepare(denoiser, c.size)
    seed = torch.initial_seed()
    with torch.no_grad(), torch.random.fork_rng(), watched.using({c.denoiser: denoiser}):
        torch.manual_seed(seed)  # adapters may drop values, in both passes the same
        trace = watched.draw(c.prompts[0], c.size, Answers(pixels=c.empty_pixels(c.size)), **c.extra)
        text = {path: leaves(size.kwargs)[path] for path in c.text}
        device = predict.device(denoiser)
        step, latents = trace.steps[0], size.maps.into(trace.steps[0].sample.flatten()[None])[0].to(device)
        level = torch.tensor([c.level_of(trace, 0)], device=device)
        torch.manual_seed(seed)
        output = denoiser(**predict.fill(size, latents, level, text))
        made = size.maps.out(join_values(output).float().cpu()[None]).reshape(step.output.shape)
    return difference(made, step.output)
