"""How a pipeline is trained: the roles of the denoiser's arguments, the objective, and the scale of the latents."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.any_pipeline.trees import Path, format_path, list_paths
from library.architectures.any_pipeline.watch import Size, Trace

Mix = Literal["flow", "ddpm"]
Target = Literal["noise - latent", "latent - noise", "noise", "latent", "velocity"]
Whole = Literal["", "cut", "rounded"]
Joint = tuple[int, int, int]  # axis, and at the size and the caption of a measurement the lengths of text and image
LEVEL_ROUNDING = 1e-6  # of a level, relative
PROMPTS = ("a cat", 'two dogs and a "sign"')  # of the measurement; some pipelines encode quoted words by another model


@dataclass(frozen=True)
class Line:
    """The noise level as the denoiser is told it: factor * level + offset, of sigma for flows, else of the timestep."""

    factor: float
    offset: float
    whole: Whole = ""  # schedulers that keep their timesteps as integers cut or round them

    def at(self, levels_B: Tensor) -> Tensor:
        values_B = self.factor * levels_B + self.offset
        if self.whole:
            return values_B.trunc() if self.whole == "cut" else values_B.round()
        return values_B

    def describe(self, name: str) -> str:
        product = name if abs(self.factor) == 1 else f"{abs(self.factor):g} {name}"
        text = f"-{product}" if self.factor < 0 else product
        if self.offset:
            text = f"{self.offset:g} {'-' if self.factor < 0 else '+'} {product}"
        return f"{text}, {self.whole} to whole numbers" if self.whole else text


@dataclass(frozen=True)
class Table:
    """The values of the denoiser's level arguments at the noise levels of the pipeline's own steps."""

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, levels_B: Tensor) -> Tensor:
        """Return the values at some levels, interpolated between the two nearest ones, and whole if all are."""
        pairs = torch.tensor(sorted(zip(self.levels, self.values, strict=True)), device=levels_B.device)
        known, values = pairs.T.contiguous()
        after = torch.searchsorted(known, levels_B).clamp(1, len(known) - 1)
        share = (levels_B - known[after - 1]) / (known[after] - known[after - 1])
        values_B: Tensor = torch.lerp(values[after - 1], values[after], share)
        return values_B.round() if torch.equal(values, values.round()) else values_B


def level_error(source: Line | Table, levels: Sequence[float], given: Sequence[float]) -> float:
    """Return how far a line or a table is from what a denoiser is given, relative to the largest value.

    A level is known up to its rounding to float32, which decides at a whole number where timesteps are cut.
    """
    levels_B, given_B = torch.tensor(levels), torch.tensor(given)
    near = [source.at(levels_B * (1 + share)) for share in (0.0, -LEVEL_ROUNDING, LEVEL_ROUNDING)]
    error_B = torch.stack([(values_B - given_B).abs() for values_B in near]).amin(0)
    return float(error_B.max() / given_B.abs().max().clamp(min=1e-9))


@dataclass(frozen=True)
class Unconditional:
    """Where the pipeline's own negative prompt is: in a call of the denoiser in each step, with guidance."""

    extra: Mapping[str, Any]  # the options that switch guidance on
    call: int
    row: int | None  # None in a call with only this prompt


@dataclass(frozen=True)
class Convention:
    """How a pipeline calls its denoiser, and what it makes of the output; true for every size."""

    pipeline: str
    denoiser: str
    idle: tuple[str, ...]  # models that are called in each step for guidance, whose outputs have no effect without it
    latents: Path
    time: tuple[Path, ...]
    text: tuple[Path, ...]
    geometry: tuple[Path, ...]
    joint: Mapping[Path, Joint]  # text before values for the image
    constant: Mapping[Path, str]  # with values as the log shows them
    fixed: Mapping[Path, str]  # digests of the constants and, at `size`, of the geometry
    extra: Mapping[str, Any]  # options that switch guidance off
    size: Size  # at which it was measured
    mix: Mix = "flow"
    target: Target = "noise - latent"
    replaces_scheduler: bool = False  # by DDIM, because the pipeline's own is random or rescales its sample
    lines: Mapping[Path, Line] = field(default_factory=dict)  # of `time`; the rest has tables
    takes_batches: bool = False  # one call for several samples gives what single calls give
    pads: bool = False  # also where shorter captions are padded with zeros
    output: Any = None  # some output of the denoiser at `size`
    argument_shape: tuple[int, ...] = ()  # of the denoiser's latents at `size`
    latent_shape: tuple[int, ...] = ()  # of what the VAE decodes, at `size`
    has_alpha: bool = False  # it decodes to RGBA
    decoding: Any = ((), {})  # other arguments of the VAE's decoder
    scale_Cpp: Any = None  # the VAE's latents are this times the sample, for each channel and place in a patch,
    offset_Cpp: Any = None  # plus this
    unconditional: Unconditional | None = None  # None if the pipeline has no negative prompt
    memory: Mapping[str, Any] = field(default_factory=dict)  # what text encoders returned for the captions of checks

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return self.size[0] // self.latent_shape[-2]

    def level_of(self, trace: Trace, step: int) -> float:
        """Return the noise level of a step: sigma for flows, else the timestep."""
        if self.mix == "flow":
            return float(levels_of(trace.scheduler)[step])
        return float(torch.as_tensor(trace.steps[step].timestep).flatten()[0])

    def latents_of(self, raw_BCHW: Tensor) -> Tensor:
        """Return the VAE's latents as the noise is added to them: without scale and offset, in their own layout."""
        return (raw_BCHW - tile(self.offset_Cpp, raw_BCHW)) / tile(self.scale_Cpp, raw_BCHW)

    def raw_of(self, latents_BCHW: Tensor) -> Tensor:
        """Return what the VAE decodes."""
        return latents_BCHW * tile(self.scale_Cpp, latents_BCHW) + tile(self.offset_Cpp, latents_BCHW)

    def weights_of(self, trace: Trace, step: int) -> tuple[float, float]:
        """Return the weights of image and noise in their mix at a step."""
        return self.weights_at(trace.scheduler, self.level_of(trace, step))

    def weights_at(self, scheduler: Any, level: float) -> tuple[float, float]:
        """Return the weights of image and noise in their mix at a noise level."""
        if self.mix == "flow":
            return 1 - level, level
        abar = float(scheduler.alphas_cumprod[round(level)])
        return math.sqrt(abar), math.sqrt(1 - abar)

    def describe(self) -> Iterator[str]:
        """Yield the lines of the log."""
        level = "sigma" if self.mix == "flow" else "t"
        times = [
            f"{format_path(p)} = {self.lines[p].describe(level) if p in self.lines else f'table of {level}'}"
            for p in self.time
        ]
        yield f"{self.pipeline}: {self.denoiser}; noise level: {'; '.join(times)}"
        channels = self.latent_shape[1]
        yield f"  latents: {format_path(self.latents)}, {channels} channels at 1/{self.downscale} of the size"
        yield f"  text: {list_paths(self.text)}; size: {list_paths((*self.geometry, *self.joint))}"
        constants = ", ".join(f"{format_path(path)} = {value}" for path, value in self.constant.items())
        yield f"  constant: {constants or 'none'}"
        lengths = "any length" if self.pads else "equal length"
        rows = f"captions of {lengths} in one call" if self.takes_batches else "samples one after another"
        yield f"  objective: {'flow' if self.mix == 'flow' else 'DDPM'}, target {self.target}; batches: {rows}"
        without = ", ".join(f"{name}={value}" for name, value in self.extra.items()) or "no option"
        yield f"  guidance is off with {without}; dropped captions are " + (
            "the empty prompt" if self.unconditional is None else "the pipeline's own negative prompt"
        )


def levels_of(scheduler: Any) -> Tensor:
    """Return the noise levels of a flow's steps; the sigmas of some schedulers, as Mochi's, grow toward the image."""
    sigmas: Tensor = scheduler.sigmas
    return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas


def format_constant(value: Any) -> str:
    """Return a constant argument as the log shows it."""
    if not isinstance(value, Tensor):
        return str(value)
    numbers = {*value.detach().float().flatten().tolist()}
    return f"{numbers.pop():g}" if len(numbers) == 1 else f"a tensor {tuple(value.shape)}"


def tile(values_Cpp: Tensor, like_BCHW: Tensor) -> Tensor:
    """Repeat a pattern over latents."""
    patch, (height, width) = values_Cpp.shape[-1], like_BCHW.shape[-2:]
    return values_Cpp.to(like_BCHW).repeat(1, height // patch, width // patch)


def targets_of(latent: Tensor, noise: Tensor, signal: float, share: float) -> dict[Target, Tensor]:
    return {
        "noise - latent": noise - latent,
        "latent - noise": latent - noise,
        "noise": noise,
        "latent": latent,
        "velocity": signal * noise - share * latent,
    }
