"""Elementwise maps between the tensors of a pipeline, read from drawings with known values.

Packing into tokens, signs, halves of channels, frames and statistics per channel are such maps: every value of the
target is a value of the source times a scale plus an offset. They are read by sending zeros, ones and the digits of
each element's own index through the pipeline; neither denoiser nor VAE runs.

Letters: B samples, N values of a source, M values of a target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.architectures.any_pipeline.convention import Convention, Table
from library.architectures.any_pipeline.trees import Path, count_values, fill_like, leaves
from library.architectures.any_pipeline.watch import Answers, Refused, Size, Trace, Watched

BASE = 32  # of the digits of an index
LEAST_SCALE = 1e-6  # of the largest one; smaller means that the source has no say
NUM_TABLE_STEPS = 100  # of a drawing from which a table of levels is read


@dataclass(frozen=True, eq=False)
class Map:
    """target[m] = offset[m] + scale[m] * source[index[m]]; an index of -1 where the source has no say.

    If `from_end`, places count from the end of a source whose length follows the caption.
    """

    index_M: Tensor
    scale_M: Tensor
    offset_M: Tensor
    shape: tuple[int, ...]  # of the target
    num_source: int
    from_end: bool = False

    def __call__(self, source_BN: Tensor) -> Tensor:
        """Return targets, shape (B, M), with gradient."""
        shift = source_BN.shape[1] - self.num_source
        if shift and not self.from_end:
            raise Refused(f"the denoiser gives {source_BN.shape[1]} values instead of {self.num_source}")
        places_M = (self.index_M + shift).clamp(min=0)
        return source_BN[:, places_M] * self.scale_M.to(source_BN) + self.offset_M.to(source_BN)

    def on(self, device: torch.device) -> "Map":
        """Return this map with its tensors on the device."""
        return replace(
            self, index_M=self.index_M.to(device), scale_M=self.scale_M.to(device), offset_M=self.offset_M.to(device)
        )

    def after(self, first: "Map") -> "Map":
        """Return the map that applies `first` and then this one."""
        inner_M = self.index_M.clamp(min=0)
        is_live_M = (self.index_M >= 0) & (first.index_M[inner_M] >= 0)
        return Map(
            torch.where(is_live_M, first.index_M[inner_M], -1),
            torch.where(is_live_M, self.scale_M * first.scale_M[inner_M], 0.0),
            self.offset_M + self.scale_M * first.offset_M[inner_M] * (self.index_M >= 0),
            self.shape,
            first.num_source,
            first.from_end,
        )

    def inverse(self, source_shape: tuple[int, ...]) -> "Map":
        """Return the map from target to source. Every value of the source must appear once."""
        order_N = torch.argsort(self.index_M)
        scale_N, offset_N = self.scale_M[order_N], self.offset_M[order_N]
        return Map(order_N, 1 / scale_N, -offset_N / scale_N, source_shape, len(self.index_M))

    @property
    def is_one_to_one(self) -> bool:
        return bool(torch.equal(self.index_M.sort().values, torch.arange(self.num_source)))

    @property
    def common_scale(self) -> float | None:
        """The scale, if all are equal and nothing is added; else None."""
        scale_M = self.scale_M[self.index_M >= 0]
        is_common = len(scale_M) and torch.allclose(scale_M, scale_M[:1].expand_as(scale_M), rtol=1e-4)
        return scale_M[0].item() if is_common and self.offset_M.abs().max() < 1e-6 else None


@dataclass(frozen=True, eq=False)
class SizeMaps:
    """The part of a convention that belongs to one size of the image."""

    into: Map  # scheduler's sample -> the denoiser's argument
    out: Map  # the denoiser's output -> the scheduler's input
    decode: Map  # scheduler's sample -> what the VAE decodes
    sample_shape: tuple[int, ...]
    kwargs: dict[str, Any]  # the denoiser's arguments for `Convention.prompts[0]`
    tables: Mapping[Path, Table]

    @property
    def residue(self) -> float:
        """How much the scheduler's input depends on the sample itself."""
        return float(self.out.offset_M.abs().max())

    def encode(self) -> Map:
        """Return the map from the VAE's latents to the scheduler's sample."""
        return self.decode.inverse(self.sample_shape)

    def latents_into(self) -> Map:
        """Return the map from normalised latents, which have the VAE's layout, to the denoiser's argument."""
        order = replace(
            self.decode, scale_M=torch.ones_like(self.decode.scale_M), offset_M=torch.zeros_like(self.decode.offset_M)
        )
        return self.into.after(order.inverse(self.sample_shape))

    def out_latents(self) -> Map:
        """Return the map from the denoiser's output to a prediction in the layout of the VAE's latents."""
        index_M = self.decode.index_M
        out = self.out
        return replace(
            out, index_M=out.index_M[index_M], scale_M=out.scale_M[index_M], offset_M=out.offset_M[index_M],
            shape=self.decode.shape,
        )  # fmt: skip


def read_pattern(decode: Map) -> tuple[Tensor, Tensor]:
    """Return (scale, offset) of the VAE's latents by channel and place in a patch of 1 or 2, shapes (C, p, p).

    Raises Refused if they follow anything else.
    """
    channels, height, width = decode.shape[1], *decode.shape[-2:]
    scale_CHW, offset_CHW = (v.reshape(channels, height, width) for v in (decode.scale_M, decode.offset_M))
    for patch in (1, 2):
        found = [values[:, :patch, :patch] for values in (scale_CHW, offset_CHW)]
        tiled = [values.repeat(1, height // patch, width // patch) for values in found]
        if all(
            torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(tiled, (scale_CHW, offset_CHW), strict=True)
        ):
            return found[0].clone(), found[1].clone()
    raise Refused("the scale of the latents follows their place in the image")


def codes(count: int) -> list[Tensor]:
    """Return zeros, ones, and the digits of 0..count-1 divided by the base."""
    index_N = torch.arange(count)
    num_digits = max(1, math.ceil(math.log(max(count, 2), BASE) - 1e-9))
    digits = [((index_N // BASE**place) % BASE).float() / BASE for place in range(num_digits)]
    return [torch.zeros(count), torch.ones(count), *digits]


def read_map(seen: Sequence[Tensor], num_source: int, what: str) -> Map:
    """Return the map from what was seen of each of `codes(num_source)`. Raises Refused if values mix."""
    zero_M, one_M, *digits = (tensor.double().flatten().cpu() for tensor in seen)
    scale_M = one_M - zero_M
    is_live_M = scale_M.abs() > LEAST_SCALE * max(1.0, scale_M.abs().max().item())
    safe_M = torch.where(is_live_M, scale_M, 1.0)
    index_M = torch.zeros_like(zero_M, dtype=torch.long)
    for place, seen_M in enumerate(digits[: len(codes(num_source)) - 2]):
        digit_M = (seen_M - zero_M) / safe_M * BASE
        if ((digit_M - digit_M.round()).abs() > 0.2)[is_live_M].any():
            raise Refused(f"{what} is not a rearrangement with a scale")
        index_M += digit_M.round().long() * BASE**place
    index_M = torch.where(is_live_M, index_M, -1)
    if index_M.max() >= num_source or (is_live_M & (index_M < 0)).any():
        raise Refused(f"{what} mixes values")
    return Map(index_M, torch.where(is_live_M, scale_M, 0.0).float(), zero_M.float(), tuple(seen[0].shape), num_source)


def answer_call(convention: Convention, template: Any, values: Tensor, place: int) -> Any:
    """Return the denoiser's output that holds `values` in the conditional call, and zeros in others."""
    is_conditional = place % convention.calls_per_step == convention.call
    return fill_like(template, values if is_conditional else torch.zeros(count_values(template)))


def answer_zeros(convention: Convention, template: Any, size: Size) -> Answers:
    zeros = torch.zeros(count_values(template))
    return Answers(partial(answer_call, convention, template, zeros), pixels=convention.empty_pixels(size))


def put_values(values: Tensor, _: int, old: Tensor) -> Tensor:
    return values.reshape(old.shape).to(old)


def draw_codes(
    watched: Watched, convention: Convention, size: Size, prompt: str, real: Trace, template: Any
) -> list[Trace]:
    """Draw once for every code, in the denoiser's output and in the sample at once."""
    num_out, sample = count_values(template), real.steps[0].sample
    of_output, of_sample = codes(num_out), codes(sample.numel())
    count = max(len(of_output), len(of_sample))
    of_output += [torch.zeros(num_out)] * (count - len(of_output))
    of_sample += [torch.zeros(sample.numel())] * (count - len(of_sample))
    traces = []
    for output, values in zip(of_output, of_sample, strict=True):
        answers = Answers(
            outputs=partial(answer_call, convention, template, output), samples=partial(put_values, values),
            pixels=real.pixels,
        )  # fmt: skip
        traces.append(watched.draw(prompt, size, answers, **convention.extra))
    return traces


def read_maps(
    watched: Watched, convention: Convention, size: Size, template: Any, prompt: str | None = None
) -> SizeMaps:
    """Read the maps of one size. `template` is any output of the denoiser for that size and prompt.

    Raises Refused if they are no elementwise maps.
    """
    c, prompt = convention, prompt or convention.prompts[0]
    real = watched.draw(prompt, size, answer_zeros(c, template, size), **c.extra)
    traces = draw_codes(watched, c, size, prompt, real, template)
    sample, call = real.steps[0].sample, real.calls[c.call]
    out = read_map(
        [t.steps[0].output for t in traces], count_values(template), "the way from the denoiser to the scheduler"
    )
    into = read_map(
        [leaves(t.calls[c.call + c.calls_per_step].kwargs)[c.latents] for t in traces], sample.numel(),
        "the way from the scheduler to the denoiser",
    )  # fmt: skip
    decode = read_map([t.decoded[0] for t in traces], sample.numel(), "the way from the scheduler to the VAE")
    if not decode.is_one_to_one:
        raise Refused("the VAE does not decode the whole sample")
    if set(into.index_M.tolist()) - {-1} != set(range(sample.numel())):
        raise Refused("the denoiser does not see the whole sample")
    tables = read_tables(watched, c, size, template)
    out = replace(out, from_end=c.counts_from_end)
    return SizeMaps(into, out, decode, tuple(sample.shape), call.kwargs, tables)


def read_tables(watched: Watched, convention: Convention, size: Size, template: Any) -> dict[Path, Table]:
    """Read the levels that are given to the denoiser by no formula, from the steps of a long drawing."""
    paths = [path for path in convention.time if path not in convention.lines]
    if not paths:
        return {}
    levels, given = read_level_values(watched, convention, size, template, NUM_TABLE_STEPS)
    return {
        path: Table(tuple(levels), tuple(given[path]), all(abs(value - round(value)) < 1e-9 for value in given[path]))
        for path in paths
    }


def read_level_values(
    watched: Watched, convention: Convention, size: Size, template: Any, steps: int
) -> tuple[list[float], dict[Path, list[float]]]:
    """Return the noise levels of a drawing's steps, and what the denoiser is given at each, by argument."""
    c = convention
    trace = watched.draw(c.prompts[0], size, answer_zeros(c, template, size), steps=steps, **c.extra)
    calls = trace.calls[c.call :: c.calls_per_step]
    given = {
        path: [float(torch.as_tensor(leaves(call.kwargs)[path]).double().flatten()[-1]) for call in calls]
        for path in c.time
    }
    return [c.level_of(trace, number) for number in range(len(trace.steps))], given
