"""Loading of FLUX.1 and Chroma checkpoints: the files of the original release, one file with everything, or a diffusers
folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.flux.layers import DIFFUSERS_MARK, KEYS
from library.architectures.flux.model import PATCH, Flux, FluxConfig, read_config
from library.architectures.flux.options import FluxOptions
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure, find_prefix, select_weights, with_prefix
from library.memory.devices import DTYPES
from library.models.clip.clip import CLIP_WORDS, clip_component, clip_of_folder, load_clip
from library.models.dit_loader import DitLoader, open_dit_loader
from library.models.identify import find_spec, open_denoiser, open_transformer, refuse_other_model
from library.models.loading import Component, LoadPart, check_text_width
from library.models.t5 import WORDS as T5_WORDS
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae, resolve_vae_dtype
from library.options.model import BASE_FLAG

MARK = "double_blocks.0.img_attn.qkv.weight"
CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "")
T5_MARK = "text_encoders.t5xxl.transformer."
FOLDERS = {  # `model_type` -> part -> folder in diffusers' layout
    "flux": {"denoiser": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"},
    "chroma": {"denoiser": "transformer", "t5xxl": "text_encoder", "ae": "vae"},
}


def open_loader(options: FluxOptions) -> DitLoader:
    """Open the files that the options name; only headers are read.

    The text encoders are CLIP-L and T5, for Chroma only T5. Raises UserError naming the flag if a file is missing,
    broken, incomplete or of another model.
    """
    flux, folders = options.parts, FOLDERS[options.parts.model_type]
    title = find_spec(list_specs(), flux.model_type).title
    paths = {"clip_l": flux.clip_l, "t5xxl": flux.t5xxl, "ae": flux.ae}
    base = open_base(
        options.model,
        f"the file of {title}'s transformer, or a diffusers folder",
        [folder for part, folder in folders.items() if paths.get(part) is None],
    )
    weights = read_denoiser(base, flux.model_type)
    config = configure(weights, read_config)
    openers: dict[str, tuple[Callable[[], Component], LoadPart]] = {
        "clip_l": (lambda: open_clip(flux.clip_l, base, folders["clip_l"]), load_clip),
        "t5xxl": (lambda: open_t5(flux.t5xxl, base, folders["t5xxl"]), load_t5),
    }
    loader = open_dit_loader(
        options,
        base,
        weights,
        partial(Flux, config),
        texts=[opener for part, opener in openers.items() if part in folders],
        text_dtype=DTYPES[options.precision.mixed_precision],
        vae=lambda: open_ae(title, flux.ae, base),
        load_vae=load_vae,
    )
    check_fit(loader, config, title)
    return loader


def is_schnell(weights: Weights) -> bool:
    """Return True for FLUX.1's step-distilled transformer, which has no guidance input."""
    return "guidance_in.in_layer.weight" not in weights.shapes


def load_ae(name: str, options: FluxOptions) -> nn.Module:
    """Load only the VAE of --ae."""
    return load_vae(
        open_ae("FLUX.1", name, BaseFiles(Path())), resolve_vae_dtype(options.model, options.precision.mixed_precision)
    )


def read_denoiser(base: BaseFiles, kind: str) -> Weights:
    """Return the denoiser's weights under our names; `kind` is `model_type`.

    Raises UserError for another model, naming it.
    """
    weights = open_transformer(list_specs(), base, kind)
    # FLUX.2 and Chroma have layers of the same names.
    refuse_other_model(list_specs(), base.flag, str(base.path), (base.whole or weights).shapes, kind)
    return open_denoiser(list_specs(), base, kind, MARK, DIFFUSERS_MARK, KEYS.from_diffusers)


def open_clip(name: str | None, base: BaseFiles, folder: str) -> Component:
    """Open CLIP-L from `clip_l` or from the base model."""
    config, weights = base.open_text_encoder("--clip_l", name, folder, CLIP_PREFIXES[0])
    if config is not None:
        return clip_of_folder(config, weights)
    weights = with_prefix(weights, find_prefix(weights.shapes, CLIP_PREFIXES))
    # sd-scripts builds FLUX.1's CLIP-L with the exact GELU, though SD 1.x, SDXL and SD3 have quick_gelu with the same
    # weights. `logit_scale`, the temperature of CLIP's contrastive loss, is no part of an encoder.
    return clip_component(select_weights(weights, {key: key for key in weights.shapes if key != "logit_scale"}), "gelu")


def open_t5(name: str | None, base: BaseFiles, folder: str) -> Component:
    """Open T5-XXL from `t5xxl` or from the base model."""
    config, weights = base.open_text_encoder("--t5xxl", name, folder, T5_MARK)
    return t5_component(weights) if config is None else t5_of_folder(config, weights)


def check_fit(loader: DitLoader, config: FluxConfig, title: str) -> None:
    """Raise UserError if the parts do not fit together."""
    if config.in_features != CHANNELS * PATCH**2:
        raise about(BASE_FLAG, loader.path, cause="does not fit")(
            f": the transformer takes {config.in_features} values per patch, but only "
            f"{CHANNELS * PATCH**2} are supported; FLUX.1 Fill, Canny, Depth and other conditioned variants are not"
        )
    *clip, t5 = loader.texts
    for part in clip:
        check_text_width("--clip_l", part.component, CLIP_WORDS, config.pooled_width, f"{title}'s CLIP-L")
    check_text_width("--t5xxl", t5.component, T5_WORDS[0], config.text_width, f"{title}'s T5-XXL")
