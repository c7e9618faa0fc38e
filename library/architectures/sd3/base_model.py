"""Stable Diffusion 3 checkpoints for merging adapters into them: the denoiser's file, with whatever else is in it."""

from pathlib import Path

from library.architectures.sd3.adapter_names import NAMES
from library.architectures.sd3.load import DENOISER_PREFIX, of_denoiser
from library.architectures.sd3.model import read_config, version_of
from library.checkpoints import sources
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model import BaseModel, WeightFile
from library.checkpoints.weights import configure, with_prefix


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises ValueError naming `flag` when it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise ValueError(f"{flag} {path}: of SD3 only single files in the original layout are merged into; give one")
    weights = sources.open_file(flag, path)
    prefix = DENOISER_PREFIX if any(key.startswith(DENOISER_PREFIX) for key in weights.shapes) else ""
    config = configure(of_denoiser(with_prefix(weights, prefix)), read_config)
    stems = sorted(key.removesuffix(".weight") for key in weights.shapes if key.endswith(".weight"))
    outside = {stem: NAMES.find(stem) for stem in stems if stem.startswith("text_encoders.")}
    inside = {
        stem: NAMES.find(f"diffusion_model.{stem.removeprefix(prefix)}")
        for stem in stems
        if stem.startswith(prefix) and stem not in outside
    }
    found = {stem: names for stem, names in (outside | inside).items() if names is not None}
    return BaseModel(
        path,
        (WeightFile("", weights, {names.kohya: stem for stem, names in found.items()}),),
        BaseNames("sd3", tuple(found.values())),
        f"stable-diffusion-3-{version_of(config)}",
    )
