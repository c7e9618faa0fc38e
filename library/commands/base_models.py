"""Opening of the checkpoints that adapters are merged into or extracted from, whatever their base model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_model import BaseModel
from library.checkpoints.base_model_spec import BaseModelSpec, bases_of_pipeline
from library.models.identify import base_of_checkpoint, find_spec
from networks.core.targets.targets import AdapterTargets, TargetModule, find_target_modules


def find_base(
    flag: str, name: str, *parts: str | tuple[str, ...], bar: type[Any] | None = None, variant: str | None = None
) -> tuple[Path, BaseModelSpec]:
    """Locate a checkpoint and recognise its base model; for a hub name, `parts` are the folders to download, in tuples
    of which one is enough, `bar` is the class of progress bars, and `variant` that of weight files.

    Raises UserError naming `flag` if the checkpoint is missing, broken or of an unknown base model.
    """
    choices = [(part,) if isinstance(part, str) else part for part in parts]
    specs, path = list_specs(), model_lookup.find_model(flag, name, choices, bar, variant)
    pipeline = pipeline_of(path)
    is_of_family = not pipeline or bool(bases_of_pipeline(specs, pipeline))
    # The weights of a U-Net tell more than a name that diffusers does not have.
    if is_of_family or ((path / "unet").is_dir() and not has_pipeline(pipeline)):
        return path, base_of_checkpoint(specs, flag, path)
    return path, general_spec()


def find_variant(words: Sequence[str]) -> str | None:
    """Return the value of --variant in a command line whose script is not known yet."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--variant", nargs="?")  # a missing value is reported by the script's parser
    variant: str | None = parser.parse_known_args(list(words))[0].variant
    return variant


def pipeline_of(path: Path) -> str:
    """Return the class name of a folder's pipeline; "" for a file, or a folder that names none."""
    return model_lookup.read_pipeline_class(path) if path.is_dir() else ""


def has_pipeline(name: str) -> bool:
    """Return True if diffusers has a pipeline of this name, not only a modular one."""
    if not name:
        return False
    import diffusers  # takes as long as all else that the tools for adapter files import

    kind = getattr(diffusers, name, None)
    return isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)


def general_spec() -> BaseModelSpec:
    """Return the spec of pipelines without a package."""
    return next(spec for spec in list_specs() if spec.is_general)


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder; only file headers are read.

    Raises UserError naming `flag` if the checkpoint is missing, broken or of an unsupported kind.
    """
    path, spec = find_base(flag, str(path), "unet", "text_encoder")
    # The packages of transformers merge into files of the original layout.
    spec = general_spec() if not spec.folders and has_pipeline(pipeline_of(path)) else spec
    return spec.open_for_merging(flag, path)


def spec_for(base: BaseModel) -> BaseModelSpec:
    """Return the spec of an opened checkpoint's base model."""
    return find_spec(list_specs(), base.names.base)


def find_adapter_targets(base: BaseModel, with_convolutions: bool) -> tuple[list[TargetModule], list[TargetModule]]:
    """Return (text encoders, denoiser): the modules that networks.lora targets, on the meta device.

    The first list is empty for base models that come without text encoders.
    """
    encoders, denoiser = spec_for(base).view_for_networks(base.path)
    targets = denoiser.adapter_targets
    assert isinstance(targets, AdapterTargets)
    classes = targets.denoiser.blocks + (targets.denoiser.conv_blocks if with_convolutions else ())
    # Targets of text encoders are declared even for checkpoints that come without them.
    text = [
        target
        for part, encoder in zip(targets.text_encoders, encoders, strict=bool(encoders))
        for target in find_target_modules(part, encoder, part.blocks)
    ]
    return text, find_target_modules(targets.denoiser, denoiser, classes)
