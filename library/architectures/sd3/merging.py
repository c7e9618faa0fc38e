"""Stable Diffusion 3 checkpoints for merging and extracting adapters: the file with the denoiser."""

from pathlib import Path

from torch import nn

from library.architectures.sd3.layers import NAMES, view
from library.architectures.sd3.load import read_denoiser
from library.architectures.sd3.model import MMDiT, read_config, recognise_version
from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.weights import configure, find_prefix
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import build_on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise about(flag, path)("is a folder; for SD3 use a single file in the original layout")
    weights = model_lookup.open_file(flag, path)
    prefix = find_prefix(weights.shapes, DENOISER_PREFIXES)
    version = recognise_version(configure(read_denoiser(weights), read_config))

    def target_names(stem: str) -> ModuleNames | None:
        if stem.startswith("text_encoders."):
            return NAMES.find(stem)
        return NAMES.find(f"diffusion_model.{stem.removeprefix(prefix)}") if stem.startswith(prefix) else None

    return open_single_file(path, weights, target_names, "sd3", f"stable-diffusion-3-{version}")


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) of a checkpoint as network modules see it, on the meta device."""
    denoiser = read_denoiser(model_lookup.open_file("the checkpoint", path))
    return view([], build_on_meta_device(MMDiT, configure(denoiser, read_config)))
