"""FLUX.1 checkpoints for merging adapters into them: the transformer's file, or one file of all parts."""

from functools import partial
from pathlib import Path

from library.architectures.flux.adapter_names import CLIP_LAYER, T5_BLOCK, clip_module, denoiser_module, t5_module
from library.architectures.flux.keys import DIFFUSERS_MARK, STACKS, TOP
from library.architectures.flux.load import CHROMA_MARK, CLIP_PREFIXES, DENOISER_PREFIXES, T5_MARK
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file, open_original
from library.errors import UserError

LAYERS = tuple((f"{stack}.", tuple(f".{layer}" for layer in layers)) for stack, _, layers in STACKS)


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` when it is missing, broken or of another kind.
    """
    path = path if path.is_dir() else model_lookup.find_model(flag, str(path), ())
    weights, prefix = open_original(flag, path, "FLUX.1", DENOISER_PREFIXES, DIFFUSERS_MARK)
    if any(key.startswith(prefix + CHROMA_MARK) for key in weights.shapes):
        raise UserError(f"{flag} {path}: this is a Chroma model, which is not supported yet")
    is_schnell = f"{prefix}guidance_in.in_layer.weight" not in weights.shapes
    architecture = f"flux-1-{'schnell' if is_schnell else 'dev'}"
    model = of_single_file(path, weights, partial(names_of, prefix=prefix), "flux", architecture)
    if not any(name.startswith("lora_unet") for name in model.files[0].stems):
        raise UserError(f"{flag} {path} has no layer of FLUX.1's transformer")
    return model


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """The names of the layer that a weight of the file belongs to; None where adapters change none."""
    clip, t5 = f"{CLIP_PREFIXES[0]}text_model.", T5_MARK
    if stem.startswith(clip) and stem.endswith(CLIP_LAYER):
        return clip_module(stem.removeprefix(clip))
    if stem.startswith(t5) and stem.endswith(T5_BLOCK):
        return t5_module(stem.removeprefix(t5))
    path = stem.removeprefix(prefix)
    is_layer = path in TOP or any(path.startswith(stack) and path.endswith(layers) for stack, layers in LAYERS)
    return denoiser_module(path) if stem.startswith(prefix) and is_layer else None
