"""Loading of FLUX.1 and Chroma checkpoints: the files of the original release, one file with everything, or a diffusers
folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.flux.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux.model import PATCH, Flux, FluxConfig, read_config
from library.architectures.flux.options import FluxOptions
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure, find_prefix, selected, with_prefix
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.clip.clip import clip_component, clip_of_folder, load_clip
from library.models.identify import find_spec, open_transformer, refuse_other_model, refuse_transformer
from library.models.loading import (
    Component,
    MaybeComponent,
    check_text_width,
    first_side,
    materialise,
    on_meta_device,
    open_if_there,
)
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae, resolve_vae_dtype
from library.options.model import BASE_FLAG

MARK = "double_blocks.0.img_attn.qkv.weight"
CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "")
CLIP_WORDS, T5_WORDS = "embeddings.token_embedding.weight", "shared.weight"
T5_MARK = "text_encoders.t5xxl.transformer."
FOLDERS = {  # `model_type` -> part -> folder in diffusers' layout
    "flux": {"denoiser": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"},
    "chroma": {"denoiser": "transformer", "t5xxl": "text_encoder", "ae": "vae"},
}


@dataclass(frozen=True)
class FluxLoader:
    """The models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: FluxConfig
    denoiser_weights: Weights
    clip: MaybeComponent | None  # None for Chroma
    t5: MaybeComponent
    ae: MaybeComponent
    dtype: torch.dtype
    vae_dtype: torch.dtype

    @property
    def num_clip_words(self) -> int | None:
        """The size of CLIP-L's vocabulary, or None if its files are missing."""
        assert self.clip is not None
        return first_side(self.clip, CLIP_WORDS)

    @property
    def num_t5_words(self) -> int | None:
        return first_side(self.t5, T5_WORDS)

    @property
    def is_schnell(self) -> bool:
        """True for the step-distilled model, which has no guidance input."""
        return not self.config.has_guidance

    def text_encoders(self) -> list[nn.Module]:
        clip = [] if self.clip is None else [self.clip_l()]
        return [*clip, load_t5(self.t5, self.dtype)]

    def clip_l(self) -> nn.Module:
        """Load only the first text encoder."""
        assert self.clip is not None
        return load_clip(self.clip, self.dtype)

    def vae(self) -> nn.Module:
        return load_vae(self.ae, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(on_meta_device(Flux, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: FluxOptions) -> FluxLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    flux, folders, title = options.flux, FOLDERS[options.flux.model_type], model_title(options.flux.model_type)
    given = {"clip_l": flux.clip_l, "t5xxl": flux.t5xxl, "ae": flux.ae}
    base = open_base(
        options.model.pretrained_model_name_or_path,
        "the file of FLUX.1's transformer, or a diffusers folder",
        [folder for part, folder in folders.items() if given.get(part) is None],
    )
    weights = read_denoiser(base, flux.model_type)
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    loader = FluxLoader(
        path=base.path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        clip=open_if_there(texts_are_cached, lambda: open_clip(flux.clip_l, base, folders["clip_l"]))
        if "clip_l" in folders
        else None,
        t5=open_if_there(texts_are_cached, lambda: open_t5(flux.t5xxl, base, folders["t5xxl"])),
        ae=open_if_there(options.caching.cache_latents_to_disk, lambda: open_ae(title, flux.ae, base)),
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=resolve_vae_dtype(options.model, options.precision.mixed_precision),
    )
    check_fit(loader, title)
    return loader


def load_ae(name: str, options: FluxOptions) -> nn.Module:
    """The VAE in the file or folder of --ae, for those who need nothing else of the model."""
    return load_vae(
        open_ae("FLUX.1", name, BaseFiles(Path())), resolve_vae_dtype(options.model, options.precision.mixed_precision)
    )


def model_title(kind: str) -> str:
    """Return a model type's name for messages."""
    return find_spec(list_specs(), kind).title


def read_denoiser(base: BaseFiles, kind: str) -> Weights:
    """Return the denoiser's weights under our names; `kind` is `model_type`.

    Raises UserError for another model, naming it.
    """
    weights = open_transformer(list_specs(), base, kind)
    refuse_other_model(list_specs(), base.flag, str(base.path), (base.whole or weights).shapes, kind)
    if DIFFUSERS_MARK in weights.shapes:
        return KEYS.from_diffusers(weights)
    if MARK not in weights.shapes:
        why = f"it has no double_blocks.0..., so it is not a {model_title(kind)} transformer"
        refuse_transformer(list_specs(), base, weights, kind, why)
    return weights


def open_clip(name: str | None, base: BaseFiles, folder: str) -> Component:
    """Open CLIP-L from `clip_l` or from the base model. FLUX.1 was trained with the exact GELU in it."""
    config, weights = base.open_text_encoder("--clip_l", name, folder, CLIP_PREFIXES[0])
    if config is not None:
        return clip_of_folder(config, weights)
    weights = with_prefix(weights, find_prefix(weights.shapes, CLIP_PREFIXES))
    return clip_component(selected(weights, {key: key for key in weights.shapes if key != "logit_scale"}), "gelu")


def open_t5(name: str | None, base: BaseFiles, folder: str) -> Component:
    """Open T5-XXL from `t5xxl` or from the base model."""
    config, weights = base.open_text_encoder("--t5xxl", name, folder, T5_MARK)
    return t5_component(weights) if config is None else t5_of_folder(config, weights)


def check_fit(loader: FluxLoader, title: str) -> None:
    """Raise UserError if the parts do not fit together."""
    config = loader.config
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values per patch, but only "
            f"{CHANNELS * PATCH**2} are supported, not FLUX.1 Fill, Canny, Depth and other conditioned variants"
        )
    if loader.clip is not None:
        check_text_width("--clip_l", loader.clip, CLIP_WORDS, config.pooled_width, f"{title}'s")
    check_text_width("--t5xxl", loader.t5, T5_WORDS, config.text_width, f"{title}'s")
