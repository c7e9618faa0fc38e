"""Wrong conventions, each of which would train without an error. `test_every_start.py` shows that each is refused.

A change takes what a run trains with and returns it with one thing wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from library.architectures.any_pipeline.convention import Convention, Line, Table
from library.architectures.any_pipeline.maps import SizeMaps, read_level_values
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.protocols import Objective


@dataclass(frozen=True)
class Trained:
    """What a run trains with."""

    predict: PipelinePredict
    codec: PipelineLatents
    objective: Objective


Change = Callable[[Trained], Trained]


def of_convention(change: Callable[[Convention], Convention]) -> Change:
    """Return the change of a kept convention, which all parts are built from."""

    def apply(trained: Trained) -> Trained:
        c = change(trained.predict.convention)
        predict = replace(trained.predict, convention=c, text=replace(trained.predict.text, convention=c))
        return Trained(predict, replace(trained.codec, convention=c), trained.objective)

    return apply


def of_maps(change: Callable[[SizeMaps], SizeMaps], sizes: Callable[[Any], Any] = lambda size: size) -> Change:
    """Return the change of what is read for each size."""

    class Wrong(PipelinePredict):
        def prepare(self, size: Any, device: torch.device) -> SizeMaps:
            return change(super().prepare(sizes(size), device))

    def apply(trained: Trained) -> Trained:
        p = trained.predict
        return replace(trained, predict=Wrong(p.watched, p.convention, p.text))

    return apply


def of_shift(factor: float) -> Change:
    class Wrong(PipelinePredict):
        def shift(self, size: Any) -> float:
            return factor * super().shift(size)

    def apply(trained: Trained) -> Trained:
        p = trained.predict
        return replace(trained, predict=Wrong(p.watched, p.convention, p.text))

    return apply


def of_codec(change: Callable[[PipelineLatents, torch.Tensor], torch.Tensor]) -> Change:
    class Wrong(PipelineLatents):
        def normalize(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
            return change(self, super().normalize(latents_BCHW))

    def apply(trained: Trained) -> Trained:
        return replace(trained, codec=Wrong(trained.codec.spec, trained.codec.convention))

    return apply


def of_objective(**values: Any) -> Change:
    return lambda trained: replace(trained, objective=replace(trained.objective, **values))  # type: ignore[type-var]


def tell(line: Line) -> Change:
    return of_convention(lambda c: replace(c, lines=dict.fromkeys(c.time, line)))


def map_part(part: str, **values: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return the change of one of the maps of a size."""

    def change(maps: SizeMaps) -> SizeMaps:
        old = getattr(maps, part)
        changed = {name: function(getattr(old, name)) for name, function in values.items()}
        return replace(maps, **{part: replace(old, **changed)})  # type: ignore[arg-type]

    return of_maps(change)


def keep_kwargs(*names: str) -> Change:
    """Return the change that takes some of the denoiser's arguments from the transposed size."""

    class Wrong(PipelinePredict):
        def prepare(self, size: Any, device: torch.device) -> SizeMaps:
            right, turned = super().prepare(size, device), super().prepare(size[::-1], device)
            return replace(right, kwargs=swap(right.kwargs, turned.kwargs, names))

    def apply(trained: Trained) -> Trained:
        p = trained.predict
        return replace(trained, predict=Wrong(p.watched, p.convention, p.text))

    return apply


def swap(right: Any, turned: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(right, dict):
        return right
    return {key: turned[key] if key in names else swap(value, turned[key], names) for key, value in right.items()}


def set_kwarg(name: str, value: float) -> Change:
    return of_maps(lambda maps: replace(maps, kwargs={**maps.kwargs, name: torch.full_like(maps.kwargs[name], value)}))


def use_table(trained: Trained) -> Trained:
    p = trained.predict
    c = p.convention
    levels, given = read_level_values(p.watched, c, c.size, c.output, 100)
    tables = {path: Table(tuple(levels), tuple(values)) for path, values in given.items()}
    changed = of_convention(lambda c: replace(c, lines={}))(trained)
    return of_maps(lambda maps: replace(maps, tables=tables))(changed)


def row_of_unconditional(row: int | None) -> Change:
    def change(c: Convention) -> Convention:
        assert c.unconditional is not None
        return replace(c, unconditional=replace(c.unconditional, row=row))

    return of_convention(change)


FLUX, SD, SDXL, WAN, SD3, CHROMA = (
    "FluxPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "WanPipeline", "StableDiffusion3Pipeline",
    "ChromaPipeline",
)  # fmt: skip
WRONG: Mapping[str, tuple[str, Change]] = {
    "target with the other sign": (FLUX, of_convention(lambda c: replace(c, target="latent - noise"))),
    "epsilon for v": (SD, of_convention(lambda c: replace(c, target="velocity"))),
    "latents reversed": (FLUX, map_part("decode", index_M=lambda index: index.flip(0))),
    "ids of the transposed shape": (FLUX, keep_kwargs("img_ids")),
    "size conditions of the transposed shape": (SDXL, keep_kwargs("time_ids")),
    "scale and shift of latents wrong": (
        FLUX, of_convention(lambda c: replace(c, scale_Cpp=1.1 * c.scale_Cpp, offset_Cpp=0 * c.offset_Cpp))),
    "shift of levels times 3": (SD3, of_shift(3.0)),
    "the caption itself for dropout": (SD, row_of_unconditional(1)),
    "the empty prompt for dropout": (SD, of_convention(lambda c: replace(c, unconditional=None))),
    "another call for dropout": (WAN, of_convention(lambda c: replace(c, unconditional=replace(
        c.unconditional, call=1 - c.unconditional.call)))),
    # Twenty more.
    "scale of latents wrong": (SD, of_convention(lambda c: replace(c, scale_Cpp=1.1 * c.scale_Cpp))),
    "offset of latents forgotten": (FLUX, of_convention(lambda c: replace(c, offset_Cpp=0 * c.offset_Cpp))),
    "statistics of the wrong channels": (WAN, of_convention(lambda c: replace(c, scale_Cpp=c.scale_Cpp.flip(0)))),
    "the codec alone scales": (SD, of_codec(lambda codec, latents: 1.02 * latents)),
    "the codec mirrors": (SD, of_codec(lambda codec, latents: latents.flip(-1))),
    "level inverted": (FLUX, tell(Line(-1.0, 1.0))),
    "level times 1000": (FLUX, tell(Line(1000.0, 0.0))),
    "level of the next timestep": (SD, tell(Line(1.0, 1.0))),
    "level rounded, not cut": (WAN, tell(Line(1000.0, 0.0, "rounded"))),
    "level not cut": (WAN, tell(Line(1000.0, 0.0))),
    "level of a table": (WAN, use_table),
    "output negated": (FLUX, map_part("out", scale_M=torch.neg)),
    "output moved by a token": (FLUX, map_part("out", index_M=lambda index: index.roll(16))),
    "input packed in reverse": (FLUX, map_part("into", index_M=lambda index: index.flip(0))),
    "pooled text forgotten": (FLUX, of_convention(lambda c: replace(
        c, text=tuple(path for path in c.text if path != ("pooled_projections",))))),
    "guidance scale of a distilled model": (FLUX, set_kwarg("guidance", 3.5)),
    "guidance left on": (SD3, of_convention(lambda c: replace(c, extra={**c.extra, "guidance_scale": 3.0}))),
    "all of the transposed shape": (FLUX, of_maps(lambda maps: maps, lambda size: size[::-1])),
    "shift of levels forgotten": (SD3, of_shift(1 / 3)),
    "objective with the other sign": (FLUX, of_objective(target_kind="latent - noise")),
    "objective of v": (SD, of_objective(predicts_velocity=True)),
    "objective of another schedule": (SD, lambda t: replace(t, objective=replace(
        t.objective, abar_T=t.objective.abar_T.square()))),  # type: ignore[attr-defined,type-var]
    "an alpha channel": (FLUX, of_convention(lambda c: replace(c, has_alpha=True))),
    "latents of half the size": (FLUX, of_convention(lambda c: replace(
        c, latent_shape=(*c.latent_shape[:-2], *(side // 2 for side in c.latent_shape[-2:]))))),
    "text and image joined a place off": (CHROMA, of_convention(lambda c: replace(
        c, joint={path: (axis, text - 1, image) for path, (axis, text, image) in c.joint.items()}))),
    "level off by a thousandth": (FLUX, of_convention(lambda c: replace(
        c, lines={path: Line(line.factor, line.offset + 1e-3 * line.factor) for path, line in c.lines.items()}))),
    "one statistic of latents": (WAN, of_convention(lambda c: replace(
        c, offset_Cpp=c.offset_Cpp + 0.1 * (torch.arange(len(c.offset_Cpp)) == 0).reshape(-1, 1, 1)))),
    "shift of levels off by a twentieth": (SD3, of_shift(1.05)),
}  # fmt: skip
"""What is wrong -> (pipeline, change)."""
