"""How a pipeline is trained: the roles of the denoiser's arguments, the objective, and the scale of the latents."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.any_pipeline.trees import Path, format_path
from library.architectures.any_pipeline.watch import Size, Trace

Mix = Literal["flow", "ddpm"]
Target = Literal["noise - latent", "latent - noise", "noise", "latent", "velocity"]


@dataclass(frozen=True)
class Line:
    """The noise level as the denoiser is told it: factor * level + offset, of sigma for flows, else of the timestep."""

    factor: float
    offset: float
    is_whole: bool

    def at(self, levels_B: Tensor) -> Tensor:
        values_B = self.factor * levels_B + self.offset
        return values_B.round() if self.is_whole else values_B

    def describe(self, name: str) -> str:
        factor = {1.0: "", -1.0: "-"}.get(self.factor, f"{self.factor:g} ")
        text = f"{factor}{name}" if not self.offset else f"{self.offset:g} {'-' if self.factor < 0 else '+'} "
        if self.offset:
            text += f"{'' if abs(self.factor) == 1 else f'{abs(self.factor):g} '}{name}"
        return f"{text}, rounded" if self.is_whole else text


@dataclass(frozen=True)
class Table:
    """The values of the denoiser's level arguments at the noise levels of the pipeline's own steps."""

    levels: tuple[float, ...]
    values: tuple[float, ...]
    is_whole: bool

    def at(self, levels_B: Tensor) -> Tensor:
        """Return the values at some levels, interpolated between the two nearest ones."""
        pairs = torch.tensor(sorted(zip(self.levels, self.values, strict=True)), device=levels_B.device)
        known, values = pairs.T.contiguous()
        after = torch.searchsorted(known, levels_B).clamp(1, len(known) - 1)
        share = (levels_B - known[after - 1]) / (known[after] - known[after - 1])
        values_B: Tensor = values[after - 1] + (values[after] - values[after - 1]) * share
        return values_B.round() if self.is_whole else values_B


@dataclass(frozen=True)
class Unconditional:
    """Where the pipeline's own negative prompt is: a row of a call of the denoiser in each step, with guidance."""

    extra: Mapping[str, Any]  # the options that switch guidance on
    call: int
    row: int
    num_rows: int


@dataclass(frozen=True)
class Convention:
    """How a pipeline calls its denoiser, and what it makes of the output; true for every size."""

    pipeline: str
    denoiser: str
    call: int  # the conditional one of the calls in each step
    calls_per_step: int
    latents: Path
    time: tuple[Path, ...]
    text: tuple[Path, ...]
    geometry: tuple[Path, ...]
    constant: tuple[Path, ...]
    extra: Mapping[str, Any]  # options that switch guidance off
    size: Size  # at which it was measured
    prompts: tuple[str, str]
    pixel_shape: tuple[int, ...]  # of what the VAE decodes to
    mix: Mix = "flow"
    target: Target = "noise - latent"
    replaces_scheduler: bool = False  # by DDIM, because the pipeline's own is random or rescales its sample
    lines: Mapping[Path, Line] = field(default_factory=dict)  # of `time`; the rest has tables
    counts_from_end: bool = False  # the prediction is behind the caption's tokens in the output
    takes_batches: bool = False  # one call for several samples gives what single calls give
    output: Any = None  # the structure of the denoiser's output at `size`, zeros
    latent_shape: tuple[int, ...] = ()  # of what the VAE decodes, at `size`
    scale_Cpp: Any = None  # the VAE's latents are this times the sample, for each channel and place in a patch,
    offset_Cpp: Any = None  # plus this
    unconditional: Unconditional | None = None  # None if the pipeline has no negative prompt

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return self.size[0] // self.latent_shape[-2]

    def level_of(self, trace: Trace, step: int) -> float:
        """Return the noise level of a step: sigma for flows, else the timestep."""
        if self.mix == "flow":
            return float(trace.scheduler.sigmas[step])
        return float(torch.as_tensor(trace.steps[step].timestep).flatten()[0])

    def latents_of(self, raw_BCHW: Tensor) -> Tensor:
        """Return the VAE's latents as the noise is added to them: without scale and offset, in their own layout."""
        scale, offset = (tile(values, raw_BCHW) for values in (self.scale_Cpp, self.offset_Cpp))
        return (raw_BCHW - offset) / scale

    def raw_of(self, latents_BCHW: Tensor) -> Tensor:
        """Return what the VAE decodes."""
        scale, offset = (tile(values, latents_BCHW) for values in (self.scale_Cpp, self.offset_Cpp))
        return latents_BCHW * scale + offset

    def empty_pixels(self, size: Size) -> Tensor:
        return torch.zeros(*self.pixel_shape[:-2], *size)

    def level_value(self, path: Path, levels_B: Tensor, tables: Mapping[Path, Table]) -> Tensor:
        """Return what the denoiser is told of noise levels at `path`."""
        return self.lines[path].at(levels_B) if path in self.lines else tables[path].at(levels_B)

    def weights_of(self, level: float, abar_T: Tensor | None) -> tuple[float, float]:
        """Return the weights of image and noise in their mix."""
        if self.mix == "flow":
            return 1 - level, level
        assert abar_T is not None
        abar = float(abar_T[round(level)])
        return math.sqrt(abar), math.sqrt(1 - abar)

    def target_of(self, latent: Tensor, noise: Tensor, level: float, abar_T: Tensor | None) -> Tensor:
        return targets_of(latent, noise, *self.weights_of(level, abar_T))[self.target]

    def describe(self) -> Iterator[str]:
        """Yield the lines of the log."""
        level = "sigma" if self.mix == "flow" else "t"
        times = [
            f"{format_path(p)} = {self.lines[p].describe(level) if p in self.lines else f'table of {level}'}"
            for p in self.time
        ]
        yield f"{self.pipeline}: {self.denoiser}, call {self.call + 1} of {self.calls_per_step} in each step"
        yield f"  latents: {format_path(self.latents)}; noise level: {'; '.join(times)}"
        roles = {"text": self.text, "size": self.geometry, "constant": self.constant}
        yield "  " + "; ".join(f"{role}: {list_paths(paths)}" for role, paths in roles.items())
        rows = "captions of equal length in one call" if self.takes_batches else "samples one after another"
        yield f"  objective: {'flow' if self.mix == 'flow' else 'DDPM'}, target {self.target}; batches: {rows}"
        without = ", ".join(f"{name}={value}" for name, value in self.extra.items()) or "no option"
        yield f"  guidance is off with {without}; dropped captions are " + (
            "the empty prompt" if self.unconditional is None else "the pipeline's own negative prompt"
        )


def tile(values_Cpp: Tensor, like_BCHW: Tensor) -> Tensor:
    """Repeat a pattern over latents."""
    patch = values_Cpp.shape[-1]
    height, width = like_BCHW.shape[-2:]
    return values_Cpp.to(like_BCHW).repeat(1, height // patch, width // patch)


def list_paths(paths: tuple[Path, ...]) -> str:
    return ", ".join(map(format_path, paths)) or "none"


def targets_of(latent: Tensor, noise: Tensor, signal: float, share: float) -> dict[Target, Tensor]:
    return {
        "noise - latent": noise - latent,
        "latent - noise": latent - noise,
        "noise": noise,
        "latent": latent,
        "velocity": signal * noise - share * latent,
    }
