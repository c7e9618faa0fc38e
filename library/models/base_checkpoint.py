"""Checkpoints of the U-Net models, for merging adapters into them and extracting adapters from them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_model import BaseModel, Third, WeightFile
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.weights import Weights, configure, with_prefix
from library.models.clip.clip import THIRDS, clip_from_any, open_clip_name
from library.models.identify import base_of_folder, refuse_other, refuse_other_file, text_encoder_in
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_from_ldm
from library.models.unet.unet import layout_of_config, unet_layout

Placed = tuple[ModuleNames, str | Third]
"""A module's names and the location of its weight in a file: the name before ".weight", or a third of a key's rows."""


@dataclass(frozen=True)
class EncoderPlace:
    """A text encoder: its folder in diffusers' layout, its prefix in a single file, and its modules' names."""

    folder: str
    prefix: str
    names: Callable[[str], ModuleNames]  # from transformers' path


@dataclass(frozen=True)
class CheckpointLayout:
    """The locations of the adapted modules in a base model's checkpoints."""

    base: str  # `BaseModelSpec.name`
    architecture: str  # modelspec.architecture of a merged file
    unet_names: Callable[[str, UnetLayout], ModuleNames]  # from diffusers' path
    encoders: tuple[EncoderPlace, ...]


def open_checkpoint(specs: Sequence[BaseModelSpec], flag: str, path: Path, layout: CheckpointLayout) -> BaseModel:
    """Open a single file or a diffusers folder; only headers of the files are read.

    Raises UserError naming `flag` if it is broken or another kind of model.
    """
    return open_folder(specs, flag, path, layout) if path.is_dir() else open_single(specs, flag, path, layout)


def open_single(specs: Sequence[BaseModelSpec], flag: str, path: Path, layout: CheckpointLayout) -> BaseModel:
    weights = model_lookup.open_file(flag, path)
    refuse_other_file(specs, flag, weights, layout.base)
    for encoder in layout.encoders:
        text_encoder_in(flag, weights, encoder.prefix)
    numbers = configure(with_prefix(weights, UNET_PREFIX), unet_layout)
    placed: list[Placed] = [
        (layout.unet_names(unet_from_ldm(f"{stem}.", numbers)[:-1], numbers), UNET_PREFIX + stem)
        for stem in stems(weights, UNET_PREFIX)
    ]
    for encoder in layout.encoders:
        placed += encoder_places(weights, encoder.prefix, encoder.names)
    return assemble(path, layout, [("", weights, placed)])


def open_folder(specs: Sequence[BaseModelSpec], flag: str, path: Path, layout: CheckpointLayout) -> BaseModel:
    class_name = model_lookup.read_pipeline_class(path)
    config, unet = model_lookup.open_part(flag, path / "unet", "unet")
    refuse_other(specs, flag, str(path), base_of_folder(specs, class_name, unet.shapes), layout.base)
    numbers = layout_of_config(config)
    parts: list[tuple[str, Weights, list[Placed]]] = [
        ("unet", unet, [(layout.unet_names(stem, numbers), stem) for stem in stems(unet, "")])
    ]
    for encoder in layout.encoders:
        _, weights = model_lookup.open_part(flag, path / encoder.folder, encoder.folder)
        parts.append((encoder.folder, weights, list(encoder_places(weights, "", encoder.names))))
    return assemble(path, layout, parts)


def stems(weights: Weights, prefix: str) -> Iterator[str]:
    """Yield the names of all modules with a `weight` below `prefix`, without the prefix."""
    for key in weights.shapes:
        if key.startswith(prefix) and key.endswith(".weight"):
            yield key[len(prefix) :].removesuffix(".weight")


def encoder_places(weights: Weights, prefix: str, names: Callable[[str], ModuleNames]) -> Iterator[Placed]:
    """Yield the modules of a text encoder. OpenCLIP stores q, k and v as thirds of one matrix."""
    for stem in stems(weights, prefix):
        yield names(clip_from_any(open_clip_name(f"{stem}.")[:-1])), prefix + stem
    for key in weights.shapes:
        packed = re.fullmatch(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight", key)
        if packed:
            for number, name in enumerate(THIRDS):
                yield names(f"encoder.layers.{packed[1]}.self_attn.{name}"), Third(key, number)


def assemble(path: Path, layout: CheckpointLayout, parts: Sequence[tuple[str, Weights, Sequence[Placed]]]) -> BaseModel:
    files = tuple(
        WeightFile(part, weights, whole_modules(placed), packed_modules(placed)) for part, weights, placed in parts
    )
    names = tuple(names for *_, placed in parts for names, _ in placed)
    return BaseModel(path, files, BaseNames(layout.base, names), layout.architecture)


def whole_modules(placed: Sequence[Placed]) -> Mapping[str, str]:
    return {names.kohya: location for names, location in placed if isinstance(location, str)}


def packed_modules(placed: Sequence[Placed]) -> Mapping[str, Third]:
    return {names.kohya: location for names, location in placed if isinstance(location, Third)}
