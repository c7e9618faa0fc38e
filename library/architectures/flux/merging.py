"""FLUX.1 and Chroma checkpoints for merging and extracting adapters: the transformer's file, or one file with
everything."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from library.architectures.flux.layers import (
    DIFFUSERS_MARK,
    KEYS,
    clip_module,
    denoiser_module,
    t5_module,
    view,
    view_chroma,
)
from library.architectures.flux.load import CLIP_PREFIXES, MARK, T5_MARK, is_schnell
from library.architectures.flux.model import Flux, read_config
from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.weights import Weights
from library.models.clip.names import CLIP_LINEAR
from library.models.t5 import T5_LINEAR
from library.models.transformer_file import TransformerFile


def name_text_layer(stem: str) -> ModuleNames | None:
    """Return the names of a layer of a text encoder in a file with everything; None for other layers."""
    clip = f"{CLIP_PREFIXES[0]}text_model."
    if stem.startswith(clip) and stem.endswith(CLIP_LINEAR):
        return clip_module(stem.removeprefix(clip))
    return t5_module(stem.removeprefix(T5_MARK)) if stem.startswith(T5_MARK) and stem.endswith(T5_LINEAR) else None


def architecture_of(weights: Weights) -> str:
    return f"flux-1-{'schnell' if is_schnell(weights) else 'dev'}"


FILE = TransformerFile(
    base="flux",
    title="FLUX.1",
    architecture=architecture_of,
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=KEYS.is_linear,
    name=denoiser_module,
    build=Flux,
    read_config=read_config,
    view=view,
    name_text_layer=name_text_layer,
)
CHROMA_FILE = replace(FILE, base="chroma", title="Chroma", architecture="chroma", view=view_chroma)


def open_clip_l(flag: str, path: Path) -> BaseModel:
    """Open a file of CLIP-L; only its header is read. Raises UserError naming `flag` for another file."""
    return open_text_encoder(flag, path, "text_model.", CLIP_LINEAR, clip_module)


def open_t5xxl(flag: str, path: Path) -> BaseModel:
    """Open a file of T5-XXL; only its header is read. Raises UserError naming `flag` for another file."""
    return open_text_encoder(flag, path, "", T5_LINEAR, t5_module)


def open_text_encoder(
    flag: str, path: Path, prefix: str, layers: tuple[str, ...], module: Callable[[str], ModuleNames]
) -> BaseModel:
    """Open a text encoder's file, with its layers under their names in adapter files."""

    def target_names(stem: str) -> ModuleNames | None:
        is_layer = stem.startswith(f"{prefix}encoder.") and stem.endswith(layers)
        return module(stem.removeprefix(prefix)) if is_layer else None

    model = open_single_file(path, model_lookup.open_file(flag, path), target_names, "flux", "")
    # Other text encoders open without an error, but have no layer of these names.
    if not model.files[0].modules:
        raise about(flag, path)(f"has no layer called {prefix}encoder....{layers[0]}", "use the file for FLUX.1")
    return model
