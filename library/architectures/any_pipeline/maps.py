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

from library.architectures.any_pipeline.convention import PROMPTS, Convention, Table
from library.architectures.any_pipeline.trees import Path, fill_like, join_values, leaves, map_tensors, move
from library.architectures.any_pipeline.watch import Answers, Refused, Size, Watched, replace_sample

BASE = 32  # of the digits of an index
LEAST_SCALE = 1e-6  # of the largest one; smaller means that the source has no say
CPU = torch.device("cpu")
NUM_TABLE_STEPS = 97  # of a drawing from which a table of levels is read; 100 steps of 10 would hide what cuts do


@dataclass(frozen=True, eq=False)
class Map:
    """target[m] = offset[m] + scale[m] * source[index[m]]; an index of -1 where the source has no say.

    If `from_end`, only the end of the source matters, behind a caption's tokens, and places count from the end.
    """

    index_M: Tensor
    scale_M: Tensor
    offset_M: Tensor
    shape: tuple[int, ...]  # of the target
    num_source: int
    from_end: bool

    def __call__(self, source_BN: Tensor) -> Tensor:
        """Return targets, shape (B, M), with gradient."""
        shift = source_BN.shape[1] - self.num_source
        if shift and not self.from_end:
            raise Refused(f"the denoiser gives {source_BN.shape[1]} values instead of {self.num_source}")
        return source_BN[:, (self.index_M + shift).clamp(min=0)] * self.scale_M.to(source_BN) + self.offset_M.to(
            source_BN
        )


@dataclass(frozen=True, eq=False)
class SizeMaps:
    """The part of a convention that belongs to one size of the image, on the denoiser's device.

    Latents have the values of the scheduler's sample in the layout of the VAE.
    """

    into: Map  # scheduler's sample -> the denoiser's argument
    out: Map  # the denoiser's output -> the scheduler's input
    decode: Map  # scheduler's sample -> what the VAE decodes
    size: Size
    template: Any  # an output of the denoiser, on the CPU
    sample_shape: tuple[int, ...]
    kwargs: dict[str, Any]  # the denoiser's arguments for the first of PROMPTS
    tables: Mapping[Path, Table]

    def to_sample(self, latents_BM: Tensor) -> Tensor:
        return latents_BM[:, self.decode.index_M.argsort()]

    def to_latents(self, sample_BN: Tensor) -> Tensor:
        return sample_BN[:, self.decode.index_M]


def read_pattern(decode: Map) -> tuple[Tensor, Tensor]:
    """Return (scale, offset) of the VAE's latents by channel and place in a patch of 1 or 2, shapes (C, p, p).

    Raises Refused if they follow anything else.
    """
    channels, height, width = decode.shape[1], *decode.shape[-2:]
    whole = [values.reshape(channels, height, width) for values in (decode.scale_M, decode.offset_M)]
    for patch in (1, 2):
        scale, offset = (values[:, :patch, :patch].clone() for values in whole)
        tiled = [values.repeat(1, height // patch, width // patch) for values in (scale, offset)]
        if all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(tiled, whole, strict=True)):
            return scale, offset
    raise Refused("the scale of the latents follows their place in the image")


def codes(count: int) -> list[Tensor]:
    """Return zeros, ones, and the digits of 0..count-1 divided by the base."""
    index_N = torch.arange(count)
    num_digits = max(1, math.ceil(math.log(max(count, 2), BASE) - 1e-9))
    digits = [((index_N // BASE**place) % BASE).float() / BASE for place in range(num_digits)]
    return [torch.zeros(count), torch.ones(count), *digits]


def read_map(seen: Sequence[Tensor], num_source: int, what: str, device: torch.device) -> Map:
    """Return the map from what was seen of each code of `num_source` values or more. Raises Refused if values mix."""
    zero_M, one_M, *digits = (tensor.double().flatten().cpu() for tensor in seen)
    scale_M = one_M - zero_M
    is_live_M = scale_M.abs() > LEAST_SCALE * max(1.0, scale_M.abs().max().item())
    safe_M = torch.where(is_live_M, scale_M, 1.0)
    index_M = torch.zeros_like(zero_M, dtype=torch.long)
    for place, seen_M in enumerate(digits):
        digit_M = (seen_M - zero_M) / safe_M * BASE
        if ((digit_M - digit_M.round()).abs() > 0.2)[is_live_M].any():
            raise Refused(f"{what} is not a rearrangement with a scale")
        index_M += digit_M.round().long() * BASE**place
    index_M = torch.where(is_live_M, index_M, -1)
    if index_M.max() >= num_source or (is_live_M & (index_M < 0)).any():
        raise Refused(f"{what} mixes values")
    scale_M = torch.where(is_live_M, scale_M, 0.0).float()
    shape, used = tuple(seen[0].shape), index_M[is_live_M].tolist() or [0]
    from_end = min(used) > 0 and max(used) == num_source - 1
    return Map(index_M.to(device), scale_M.to(device), zero_M.float().to(device), shape, num_source, from_end)


def answer_with(template: Any, values: Tensor | None = None) -> Answers:
    """Return answers of the denoiser that hold `values`, or zeros."""
    filled = torch.zeros_like(join_values(template)) if values is None else values
    return Answers(lambda _: fill_like(template, filled))


def resize_output(convention: Convention, latents: Tensor) -> Any:
    """Return zeros like the denoiser's output for latents of another size, whose growth it shares along each axis."""
    growth = [new - old for new, old in zip(latents.shape, convention.argument_shape, strict=True)]

    def resize(output: Tensor) -> Tensor:
        if output.ndim != len(growth):
            raise Refused("the denoiser's output has other axes than the latents")
        return torch.zeros([side + more for side, more in zip(output.shape, growth, strict=True)])

    return map_tensors(convention.output, resize)


def read_maps(watched: Watched, convention: Convention, size: Size, device: torch.device = CPU) -> SizeMaps:
    """Read the maps of one size. Raises Refused if they are no elementwise maps."""
    c = convention
    first = watched.draw(PROMPTS[0], size, Answers(stops_at=0), **c.extra).calls[0]
    template = resize_output(c, leaves(first.kwargs)[c.latents])
    num_out = len(join_values(template))
    real = watched.draw(PROMPTS[0], size, answer_with(template), **c.extra)
    shape = real.steps[0].sample.shape
    num_sample = math.prod(shape)
    traces = []
    for code in codes(max(num_out, num_sample)):  # for both at once
        sample = code[:num_sample].reshape(shape)
        answers = replace(answer_with(template, code[:num_out]), samples=partial(replace_sample, sample))
        traces.append(watched.draw(PROMPTS[0], size, answers, **c.extra))
    arguments = [leaves(trace.calls[1].kwargs)[c.latents] for trace in traces]
    out = read_map([t.steps[0].output for t in traces], num_out, "the way from the denoiser to the scheduler", device)
    into = read_map(arguments, num_sample, "the way from the scheduler to the denoiser", device)
    decode = read_map([t.decoded[0] for t in traces], num_sample, "the way from the scheduler to the VAE", device)
    places = list(range(num_sample))
    if sorted(decode.index_M.tolist()) != places:
        raise Refused(
            "the VAE does not decode the whole sample, as where two frames are the least that is drawn; use a model "
            "that draws single images"
        )
    if sorted({*into.index_M.tolist()} - {-1}) != places:
        raise Refused("the denoiser does not see the whole sample")
    tables = {}
    if without_line := set(c.time) - c.lines.keys():
        levels, given = read_level_values(watched, c, size, template, NUM_TABLE_STEPS)
        tables = {path: Table(tuple(levels), tuple(given[path])) for path in without_line}
    return SizeMaps(into, out, decode, size, template, tuple(shape), move(first.kwargs, device), tables)


def read_level_values(
    watched: Watched, convention: Convention, size: Size, template: Any, steps: int
) -> tuple[list[float], dict[Path, list[float]]]:
    """Return the noise levels of a drawing's steps, and what the denoiser is given at each, by argument."""
    c = convention
    trace = watched.draw(PROMPTS[0], size, answer_with(template), steps=steps, **c.extra)
    given = [leaves(call.kwargs) for call in trace.calls]
    return [c.level_of(trace, number) for number in range(len(trace.steps))], {
        path: [float(torch.as_tensor(values[path]).double().flatten()[-1]) for values in given] for path in c.time
    }
