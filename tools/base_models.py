"""The checkpoints that adapters are merged into and extracted from, opened by what they are."""

from collections.abc import Callable, Mapping
from pathlib import Path

from library.architectures.anima import merging as anima
from library.architectures.flux import merging as flux
from library.architectures.hunyuan_image import merging as hunyuan_image
from library.architectures.lumina import merging as lumina
from library.architectures.sd import merging as sd
from library.architectures.sd3 import merging as sd3
from library.architectures.sdxl import merging as sdxl
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import BASES
from library.checkpoints.base_model import BaseModel
from library.errors import UserError
from library.models.base_checkpoint import base_of_checkpoint, open_checkpoint
from networks.core.sites.targets import AdapterTargets, Site, find_sites

OPENERS: Mapping[str, Callable[[str, Path], BaseModel]] = {
    "anima": anima.open_base_model,
    "flux": flux.open_base_model,
    "hunyuan_image": hunyuan_image.open_base_model,
    "lumina": lumina.open_base_model,
    "sd3": sd3.open_base_model,
}
LAYOUTS = {**sd.LAYOUTS, **sdxl.LAYOUTS}
SEEN = {base: package.seen_by_networks for package in (sd, sdxl) for base in package.LAYOUTS}


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder; of the files only headers are read.

    Raises UserError naming `flag` when it is missing, broken or of a kind that nothing is merged into.
    """
    path = model_lookup.find_model(flag, str(path), (("unet",), ("text_encoder",)))
    base = base_of_checkpoint(flag, path)
    if base is not None and base in OPENERS:
        return OPENERS[base](flag, path)
    if base is not None and base not in LAYOUTS:
        known = ", ".join(BASES[other] for other in (*LAYOUTS, *OPENERS))
        raise UserError(f"{flag} {path} is of {BASES[base]}, which is not supported here yet; supported: {known}")
    return open_checkpoint(flag, path, LAYOUTS[base or "sd1"])


def adapter_sites(base: BaseModel, with_convolutions: bool) -> tuple[list[Site], list[Site]]:
    """(text encoders, denoiser): the modules that networks.lora adapts, with conv_dim or not; on the meta device.

    Raises UserError for a base model from which nothing is extracted yet.
    """
    kind = base.names.base
    if kind not in SEEN:
        known = ", ".join(BASES[other] for other in SEEN)
        raise UserError(f"{base.path} is of {BASES[kind]}; only from {known} a LoRA is extracted yet")
    encoders, denoiser = SEEN[kind](base.path, kind)
    targets = denoiser.adapter_targets
    assert isinstance(targets, AdapterTargets)
    classes = targets.denoiser.blocks + (targets.denoiser.conv_blocks if with_convolutions else ())
    text = [
        site
        for part, encoder in zip(targets.text_encoders, encoders, strict=True)
        for site in find_sites(part, encoder, part.blocks)
    ]
    return text, find_sites(targets.denoiser, denoiser, classes)
