"""Stable Diffusion 3 checkpoints for merging adapters into them: the denoiser's file, with whatever else is in it."""

from pathlib import Path

from library.architectures.sd3.adapter_names import NAMES
from library.architectures.sd3.load import DENOISER_PREFIX, of_denoiser
from library.architectures.sd3.model import read_config, version_of
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.errors import UserError


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` when it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: of SD3 only single files in the original layout are merged into; give one")
    weights = model_lookup.open_file(flag, path)
    prefix = DENOISER_PREFIX if any(key.startswith(DENOISER_PREFIX) for key in weights.shapes) else ""
    config = configure(of_denoiser(with_prefix(weights, prefix)), read_config)

    def names_of(stem: str) -> ModuleNames | None:
        if stem.startswith("text_encoders."):
            return NAMES.find(stem)
        return NAMES.find(f"diffusion_model.{stem.removeprefix(prefix)}") if stem.startswith(prefix) else None

    return of_single_file(path, weights, names_of, "sd3", f"stable-diffusion-3-{version_of(config)}")
