"""Stable Diffusion 1.x checkpoints for merging adapters into them and extracting adapters from them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from library.architectures.sd.adapter_names import clip_module, unet_module
from library.architectures.sd.load import CLIP_PREFIXES
from library.architectures.sd.targets import TARGETS
from library.architectures.sd.view import view
from library.checkpoints import sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_model import BaseModel, WeightFile
from library.checkpoints.weights import Weights, configure, renamed, with_prefix
from library.models.clip import clip_config, clip_from_any, empty_clip
from library.models.recognise import base_of_folder, refuse_other_file, refuse_other_folder
from library.models.unet import empty_unet, unet_config, unet_layout
from library.models.unet_keys import UNET_PREFIX, UnetLayout, unet_from_ldm
from networks.core.targets import Site, find_sites

CLIP_PREFIX = CLIP_PREFIXES["sd1"]


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder; of the files only headers are read.

    Raises ValueError naming `flag` when it is missing, broken or another kind of model.
    """
    try:
        path = sources.find_model(flag, str(path), (("unet",), ("text_encoder",)))
        return open_folder(flag, path) if path.is_dir() else open_single(flag, path)
    except ValueError as error:
        message = str(error)
        if "train_network.py" in message or "--v2" in message:  # written for training
            message = f"{message.split('; use ')[0].split('; add ')[0]}; only Stable Diffusion 1.x is supported yet"
        raise ValueError(message) from None


def open_single(flag: str, path: Path) -> BaseModel:
    weights = sources.open_file(flag, path)
    refuse_other_file(flag, weights, "sd1", (CLIP_PREFIX,))
    layout = configure(with_prefix(weights, UNET_PREFIX), unet_layout)
    unet = stems(weights, UNET_PREFIX, lambda key: unet_module(unet_from_ldm(f"{key}.", layout)[:-1], layout))
    clip = stems(weights, CLIP_PREFIX, lambda key: clip_module(clip_from_any(key)))
    return model(path, [("", weights, {**unet, **clip})])


def open_folder(flag: str, path: Path) -> BaseModel:
    class_name = sources.read_json(path / "model_index.json").get("_class_name", "")
    config, unet = sources.open_part(flag, path / "unet", "unet")
    _, clip = sources.open_part(flag, path / "text_encoder", "text_encoder")
    refuse_other_folder(flag, str(path), base_of_folder(class_name, unet.shapes), "sd1")
    attends = tuple(kind.startswith("CrossAttn") for kind in config.get("down_block_types", ()))
    layout = UnetLayout(int(config.get("layers_per_block", 2)), attends)
    return model(
        path,
        [
            ("unet", unet, stems(unet, "", lambda key: unet_module(key, layout))),
            ("text_encoder", clip, stems(clip, "", lambda key: clip_module(clip_from_any(key)))),
        ],
    )


def stems(weights: Weights, prefix: str, names_of: Callable[[str], ModuleNames]) -> dict[str, ModuleNames]:
    """The names of every module with a `weight` below `prefix`, by its name in the file."""
    ends = (key.removesuffix(".weight") for key in weights.shapes if key.startswith(prefix) and key.endswith(".weight"))
    return {stem: names_of(stem[len(prefix) :]) for stem in ends}


def model(path: Path, parts: list[tuple[str, Weights, Mapping[str, ModuleNames]]]) -> BaseModel:
    files = tuple(
        WeightFile(part, weights, {names.kohya: stem for stem, names in found.items()})
        for part, weights, found in parts
    )
    return BaseModel(path, files, BaseNames("sd1", tuple(names for *_, found in parts for names in found.values())))


def adapter_sites(base: BaseModel, with_convolutions: bool) -> tuple[list[Site], list[Site]]:
    """(text encoder, denoiser): the modules that networks.lora adapts, with conv_dim or not; on the meta device."""
    unet, clip = diffusers_parts(base)
    encoder, denoiser = view([empty_clip(configure(clip, clip_config))], empty_unet(configure(unet, unet_config)))
    classes = TARGETS.denoiser.blocks + (TARGETS.denoiser.conv_blocks if with_convolutions else ())
    (part,) = TARGETS.text_encoders
    return find_sites(part, encoder, part.blocks), find_sites(TARGETS.denoiser, denoiser, classes)


def diffusers_parts(base: BaseModel) -> tuple[Weights, Weights]:
    """(U-Net, text encoder) under the module paths of diffusers and transformers."""
    if base.is_folder:
        unet, clip = (file.weights for file in base.files)
        return unet, renamed(clip, clip_from_any)
    weights = base.files[0].weights
    unet = with_prefix(weights, UNET_PREFIX)
    layout = configure(unet, unet_layout)
    return renamed(unet, lambda key: unet_from_ldm(key, layout)), renamed(
        with_prefix(weights, CLIP_PREFIX), clip_from_any
    )
