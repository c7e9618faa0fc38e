"""FLUX.1 checkpoints for merging adapters into them: the transformer's file, or one file of all parts."""

from collections.abc import Iterator
from pathlib import Path

from library.architectures.flux.adapter_names import CLIP_LAYER, T5_BLOCK, clip_module, denoiser_module, t5_module
from library.architectures.flux.keys import DIFFUSERS_MARK, STACKS, TOP
from library.architectures.flux.load import CHROMA_MARK, CLIP_PREFIXES, DENOISER_PREFIXES, T5_MARK
from library.checkpoints import sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_model import BaseModel, WeightFile

LAYERS = tuple((f"{stack}.", tuple(f".{layer}" for layer in layers)) for stack, _, layers in STACKS)


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises ValueError naming `flag` when it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise ValueError(
            f"{flag} {path}: of FLUX.1 only files in the original layout are merged into; give such a file"
        )
    path = sources.find_model(flag, str(path), ())
    weights = sources.open_file(flag, path)
    prefix = next(p for p in DENOISER_PREFIXES if any(key.startswith(p) for key in weights.shapes))
    if prefix + DIFFUSERS_MARK in weights.shapes:
        raise ValueError(
            f"{flag} {path}: this is a transformer in diffusers' layout; give a file in the original layout, which is "
            "what programs load"
        )
    if any(key.startswith(prefix + CHROMA_MARK) for key in weights.shapes):
        raise ValueError(f"{flag} {path}: this is a Chroma model, which is not supported yet")
    stems = {key.removesuffix(".weight") for key in weights.shapes if key.endswith(".weight")}
    found = {stem: names for stem in sorted(stems) for names in names_of(stem, prefix)}
    if not any(names.kohya.startswith("lora_unet") for names in found.values()):
        raise ValueError(f"{flag} {path} has no layer of FLUX.1's transformer")
    is_schnell = f"{prefix}guidance_in.in_layer.weight" not in weights.shapes
    return BaseModel(
        path,
        (WeightFile("", weights, {names.kohya: stem for stem, names in found.items()}),),
        BaseNames("flux", tuple(found.values())),
        f"flux-1-{'schnell' if is_schnell else 'dev'}",
    )


def names_of(stem: str, prefix: str) -> Iterator[ModuleNames]:
    """The names of the layer that a weight of the file belongs to; nothing where adapters change none."""
    clip, t5 = f"{CLIP_PREFIXES[0]}text_model.", T5_MARK
    if stem.startswith(clip) and stem.endswith(CLIP_LAYER):
        yield clip_module(stem.removeprefix(clip))
    elif stem.startswith(t5) and stem.endswith(T5_BLOCK):
        yield t5_module(stem.removeprefix(t5))
    elif stem.startswith(prefix):
        path = stem.removeprefix(prefix)
        if path in TOP or any(path.startswith(stack) and path.endswith(layers) for stack, layers in LAYERS):
            yield denoiser_module(path)
