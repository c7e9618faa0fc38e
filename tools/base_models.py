"""The checkpoints that adapters are merged into and extracted from, opened by what they are."""

from collections.abc import Callable, Mapping
from pathlib import Path

from library.architectures.anima import merging as anima
from library.architectures.anima.assembly import RECIPE as ANIMA
from library.architectures.flux import merging as flux
from library.architectures.flux.assembly import RECIPE as FLUX
from library.architectures.hunyuan_image import merging as hunyuan_image
from library.architectures.hunyuan_image.assembly import RECIPE as HUNYUAN_IMAGE
from library.architectures.lumina import merging as lumina
from library.architectures.lumina.assembly import RECIPE as LUMINA
from library.architectures.sd import merging as sd
from library.architectures.sd.assembly import metadata as sd_metadata
from library.architectures.sd3 import merging as sd3
from library.architectures.sd3.assembly import RECIPE as SD3
from library.architectures.sdxl import merging as sdxl
from library.architectures.sdxl.assembly import RECIPE as SDXL
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import BASES
from library.checkpoints.base_model import BaseModel
from library.errors import UserError
from library.models.base_checkpoint import base_of_checkpoint, open_checkpoint
from library.models.recipe import Recipe
from networks.core.sites.targets import AdapterTargets, Site, find_sites

OPENERS: Mapping[str, Callable[[str, Path], BaseModel]] = {
    "anima": anima.open_base_model,
    "flux": flux.open_base_model,
    "hunyuan_image": hunyuan_image.open_base_model,
    "lumina": lumina.open_base_model,
    "sd3": sd3.open_base_model,
}
LAYOUTS = {**sd.LAYOUTS, **sdxl.LAYOUTS}
SEEN = {
    **{base: package.seen_by_networks for package in (sd, sdxl) for base in package.LAYOUTS},
    "anima": anima.seen_by_networks,
    "flux": flux.seen_by_networks,
    "hunyuan_image": hunyuan_image.seen_by_networks,
    "lumina": lumina.seen_by_networks,
    "sd3": sd3.seen_by_networks,
}
RECIPES: Mapping[str, Recipe] = {
    "anima": ANIMA, "flux": FLUX, "hunyuan_image": HUNYUAN_IMAGE, "lumina": LUMINA, "sd3": SD3, "sdxl": SDXL,
}  # fmt: skip


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

    The text encoders are those of Stable Diffusion 1.x, 2.x and XL; of the others only the transformer is looked at.
    """
    encoders, denoiser = SEEN[base.names.base](base.path, base.names.base)
    targets = denoiser.adapter_targets
    assert isinstance(targets, AdapterTargets)
    classes = targets.denoiser.blocks + (targets.denoiser.conv_blocks if with_convolutions else ())
    text = [
        site
        for part, encoder in zip(targets.text_encoders, encoders, strict=bool(encoders))
        for site in find_sites(part, encoder, part.blocks)
    ]
    return text, find_sites(targets.denoiser, denoiser, classes)


def adapter_metadata(base: BaseModel, predicts_velocity: bool) -> dict[str, str]:
    """What an adapter file for a checkpoint says about its base model."""
    kind = base.names.base
    if kind not in RECIPES:
        return sd_metadata(kind == "sd2", predicts_velocity)
    metadata = {
        "ss_v2": "False",
        "ss_base_model_version": base.architecture.removeprefix("stable-diffusion-3-"),  # SD3's recipe has none
        **RECIPES[kind].metadata,
        "modelspec.architecture": f"{base.architecture}/lora",
    }
    if kind in LAYOUTS:
        metadata["modelspec.prediction_type"] = "v" if predicts_velocity else "epsilon"
    return metadata
