"""Checkpoints of FLUX.1 and Chroma to modules: the files of the original release, one file of all, or a folder of
diffusers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.flux.checkpoint_keys import DIFFUSERS_MARK, from_diffusers
from library.architectures.flux.model import PATCH, Flux, FluxConfig, read_config
from library.architectures.flux.options import FluxOptions
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights, configure, selected, with_prefix
from library.errors import NotThere, UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.clip.clip import clip_component, clip_of_folder, load_clip
from library.models.identify import refuse_other_folder, refuse_other_model, spec_of
from library.models.loading import Absent, Component, MaybeComponent, first_side, materialise, open_if_there
from library.models.shapes import shape_of
from library.models.t5 import load_t5, t5_component, t5_of_folder
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import empty_vae
from library.options.model import BASE_FLAG

DENOISER_PREFIXES = ("model.diffusion_model.", "")
CLIP_PREFIXES = ("text_encoders.clip_l.transformer.", "")
T5_MARK = "text_encoders.t5xxl.transformer."
FOLDERS = {  # --model_type -> part -> folder in diffusers' layout
    "flux": {"denoiser": "transformer", "clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"},
    "chroma": {"denoiser": "transformer", "t5xxl": "text_encoder", "ae": "vae"},
}


@dataclass(frozen=True)
class FluxLoader:
    """The models, each loaded when it is asked for; frozen, on the CPU."""

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
        """None where the encoder is not there."""
        assert self.clip is not None
        return first_side(self.clip, "embeddings.token_embedding.weight")

    @property
    def num_t5_words(self) -> int | None:
        return first_side(self.t5, "shared.weight")

    @property
    def is_schnell(self) -> bool:
        """The step-distilled model, which has no input for guidance."""
        return not self.config.has_guidance

    def text_encoders(self) -> list[nn.Module]:
        clip = [] if self.clip is None else [self.clip_l()]
        return [*clip, load_t5(self.t5, self.dtype)]

    def clip_l(self) -> nn.Module:
        """The first text encoder alone."""
        assert self.clip is not None
        return load_clip(self.clip, self.dtype)

    def vae(self) -> nn.Module:
        return materialise(empty_vae(self.ae.config), self.ae.weights, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(empty_flux(self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: FluxOptions) -> FluxLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag when a file is missing, broken, incomplete or of another model.
    """
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: give the file of FLUX.1's transformer, or a diffusers folder")
    kind = options.flux.model_type
    folders = FOLDERS[kind]
    wanted = {"clip_l": options.flux.clip_l, "t5xxl": options.flux.t5xxl, "ae": options.flux.ae}
    path = model_lookup.find_model(BASE_FLAG, name, [(f,) for part, f in folders.items() if wanted.get(part) is None])
    whole = None if path.is_dir() else model_lookup.open_file(BASE_FLAG, path)
    weights = denoiser_of(path, whole, kind)
    config = configure(weights, read_config)
    title = title_of(kind)
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    loader = FluxLoader(
        path=path,
        config=config,
        denoiser_weights=weights,
        clip=open_if_there(texts_are_cached, lambda: open_clip(wanted["clip_l"], path, whole, folders["clip_l"]))
        if "clip_l" in folders
        else None,
        t5=open_if_there(texts_are_cached, lambda: open_t5(wanted["t5xxl"], path, whole, folders["t5xxl"])),
        ae=open_if_there(
            options.caching.cache_latents_to_disk, lambda: open_ae(title, BASE_FLAG, wanted["ae"], path, whole)
        ),
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=vae_dtype_of(options),
    )
    check_fit(loader, title)
    return loader


def vae_dtype_of(options: FluxOptions) -> torch.dtype:
    """What the VAE computes in."""
    return torch.float32 if options.model.no_half_vae else DTYPES[options.precision.mixed_precision]


def load_ae(name: str, options: FluxOptions) -> nn.Module:
    """The VAE in the file or folder of --ae, for those who need nothing else of the model."""
    ae = open_ae("FLUX.1", BASE_FLAG, name, Path(), None)
    return materialise(empty_vae(ae.config), ae.weights, vae_dtype_of(options))


def empty_flux(config: FluxConfig) -> Flux:
    """The denoiser on the meta device."""
    with torch.device("meta"):
        return Flux(config)


def title_of(kind: str) -> str:
    """What messages call the model of a --model_type."""
    return spec_of(list_specs(), kind).title


def denoiser_of(path: Path, whole: Weights | None, kind: str) -> Weights:
    """The denoiser's weights under our names; `kind` is --model_type.

    Raises UserError saying which model it is where it is another.
    """
    if whole is None:
        refuse_other_folder(list_specs(), BASE_FLAG, path, kind)
        folder = FOLDERS[kind]["denoiser"]
        _, weights = model_lookup.open_part(BASE_FLAG, path / folder, folder)
    else:
        prefix = next(p for p in DENOISER_PREFIXES if any(key.startswith(p) for key in whole.shapes))
        weights = with_prefix(whole, prefix)
    refuse_other_model(list_specs(), BASE_FLAG, str(path), (whole or weights).shapes, kind)
    if DIFFUSERS_MARK in weights.shapes:
        return from_diffusers(weights)
    if "double_blocks.0.img_attn.qkv.weight" not in weights.shapes:
        names = list(weights.shapes)
        raise UserError(
            f"{BASE_FLAG} {path}: nothing in it is called double_blocks.0..., so it is no {title_of(kind)} transformer "
            f"(first names: {', '.join(names[:3]) or 'none'})"
        )
    return weights


def open_clip(name: str | None, base: Path, whole: Weights | None, folder: str) -> Component:
    """CLIP-L from --clip_l, or from the base model. FLUX.1 was trained with the exact GELU in it."""
    found = open_text_encoder("--clip_l", name, base, whole, folder, CLIP_PREFIXES)
    if isinstance(found, Component):
        return clip_of_folder(found.config, found.weights)
    kept = {key: key for key in found.shapes if key != "logit_scale"}
    return clip_component(selected(found, kept), "gelu")


def open_t5(name: str | None, base: Path, whole: Weights | None, folder: str) -> Component:
    """T5-XXL from --t5xxl, or from the base model."""
    found = open_text_encoder("--t5xxl", name, base, whole, folder, (T5_MARK, ""))
    return t5_of_folder(found.config, found.weights) if isinstance(found, Component) else t5_component(found)


def open_text_encoder(
    flag: str, name: str | None, base: Path, whole: Weights | None, folder: str, prefixes: tuple[str, ...]
) -> Component | Weights:
    """A `Component` from a folder, `Weights` without prefix from a file."""
    if name is None:
        if whole is None:
            return Component(*model_lookup.open_part(BASE_FLAG, base / folder, folder))
        if not any(key.startswith(prefixes[0]) for key in whole.shapes):
            raise NotThere(f"{flag} is missing: {base} has no such text encoder in it")
        return with_prefix(whole, prefixes[0])
    config, weights = model_lookup.open_model(flag, name, folder)
    if config is not None:
        return Component(config, weights)
    return with_prefix(weights, next(p for p in prefixes if not p or any(k.startswith(p) for k in weights.shapes)))


def check_fit(loader: FluxLoader, title: str) -> None:
    """Raise UserError where the parts do not fit together."""
    config = loader.config
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values a patch, training feeds "
            f"{CHANNELS * PATCH**2}; FLUX.1 Fill, Canny, Depth and other conditioned variants are not supported"
        )
    for flag, component, width in (
        ("--clip_l", loader.clip, config.pooled_width),
        ("--t5xxl", loader.t5, config.text_width),
    ):
        if component is None or isinstance(component, Absent):
            continue
        name = "embeddings.token_embedding.weight" if flag == "--clip_l" else "shared.weight"
        found = shape_of(component.weights.shapes, name)[1]
        if found != width:
            raise UserError(
                f"{flag} {component.weights.origin} is {found} wide, the transformer listens to {width}; it is another "
                f"encoder than {title}'s"
            )
