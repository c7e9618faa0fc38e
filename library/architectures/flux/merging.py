"""FLUX.1 and Chroma checkpoints for merging and extracting adapters: the transformer's file, or one file with
everything."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.flux.adapter_names import clip_module, denoiser_module, t5_module
from library.architectures.flux.checkpoint_keys import APPROXIMATOR, DIFFUSERS_MARK, KEYS
from library.architectures.flux.load import CLIP_PREFIXES, T5_MARK, model_title
from library.architectures.flux.model import Flux, read_config
from library.architectures.flux.targets import view
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.errors import UserError
from library.models.clip.names import CLIP_LINEAR
from library.models.loading import on_meta_device
from library.models.t5 import T5_LINEAR
from library.models.transformer_file import open_transformer_file

APPROXIMATOR_LAYERS = ("_proj", "_layer")  # endings of its layers' names


def open_base_model(kind: str, flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read. `kind` is `model_type`.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    path = path if path.is_dir() else model_lookup.find_model(flag, str(path), ())
    weights, prefix = open_transformer_file(flag, path, model_title(kind), None, DIFFUSERS_MARK)
    architecture = kind
    if kind == "flux":
        is_schnell = f"{prefix}guidance_in.in_layer.weight" not in weights.shapes
        architecture = f"flux-1-{'schnell' if is_schnell else 'dev'}"
    model = of_single_file(path, weights, partial(target_names, prefix=prefix), kind, architecture)
    if not any(name.startswith("lora_unet") for name in model.files[0].stems):
        raise UserError(f"{flag} {path} has no layers of {model_title(kind)}'s transformer")
    return model


def target_names(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    clip, t5 = f"{CLIP_PREFIXES[0]}text_model.", T5_MARK
    if stem.startswith(clip) and stem.endswith(CLIP_LINEAR):
        return clip_module(stem.removeprefix(clip))
    if stem.startswith(t5) and stem.endswith(T5_LINEAR):
        return t5_module(stem.removeprefix(t5))
    path = stem.removeprefix(prefix)
    is_layer = KEYS.is_linear(path) or (path.startswith(APPROXIMATOR) and path.endswith(APPROXIMATOR_LAYERS))
    return denoiser_module(path) if stem.startswith(prefix) and is_layer else None


def open_clip_l(flag: str, path: Path) -> BaseModel:
    """Open a file of CLIP-L; only its header is read. Raises UserError naming `flag` for another file."""
    return open_text_encoder(flag, path, "text_model.", CLIP_LINEAR, clip_module)


def open_t5xxl(flag: str, path: Path) -> BaseModel:
    """Open a file of T5-XXL; only its header is read. Raises UserError naming `flag` for another file."""
    return open_text_encoder(flag, path, "", T5_LINEAR, t5_module)


def open_text_encoder(
    flag: str, path: Path, prefix: str, layers: tuple[str, ...], module: Callable[[str], ModuleNames]
) -> BaseModel:
    """Open a text encoder's file with its layers by their names in adapter files."""

    def target_names(stem: str) -> ModuleNames | None:
        is_layer = stem.startswith(f"{prefix}encoder.") and stem.endswith(layers)
        return module(stem.removeprefix(prefix)) if is_layer else None

    model = of_single_file(path, model_lookup.open_file(flag, path), target_names, "flux", "")
    if not model.files[0].modules:
        raise UserError(f"{flag} {path} has no layer called {prefix}encoder....{layers[0]}; use the file for FLUX.1")
    return model


def seen_by_networks(kind: str, path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, model_title(kind), None, DIFFUSERS_MARK)
    return view([], on_meta_device(Flux, configure(with_prefix(weights, prefix), read_config)))
