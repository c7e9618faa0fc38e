"""Loading of FLUX.2 checkpoints: three files, one file with everything, or a diffusers folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.flux_2.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux_2.model import Flux2, Flux2Config, read_config
from library.architectures.flux_2.options import Flux2Options
from library.architectures.flux_2.releases import (
    FLAG,
    Release,
    TextEncoder,
    check_encoder,
    encoder_of,
    release_named,
    release_of,
)
from library.architectures.flux_2.vae import SPEC, load_flux_2_vae, open_vae
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.dit import open_dit, open_without_dit, text_dtype_of
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, store_in_8_bits
from library.models.loading import Component, MaybeComponent, first_side, materialise, on_meta_device, open_if_there
from library.models.qwen3 import FOLDER
from library.models.vae.vae import vae_dtype_of
from library.options.model import BASE_FLAG

MODEL = "FLUX.2"
MARK = "single_stream_modulation.lin.weight"


@dataclass(frozen=True)
class Flux2Loader:
    """The three models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: Flux2Config | None  # None without a denoiser, for the caching commands
    denoiser_weights: Weights
    encoder: TextEncoder
    encoder_component: MaybeComponent
    ae: MaybeComponent
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    shrinks_text: bool  # the text encoder is kept in 8 bits

    @property
    def num_words(self) -> int | None:
        """The size of the text encoder's vocabulary, or None if its files are missing."""
        return first_side(self.encoder_component, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        encoder = self.encoder.load(self.encoder_component, self.text_dtype)
        if self.shrinks_text:
            store_in_8_bits(encoder, self.encoder.name)
        return [encoder]

    def vae(self) -> nn.Module:
        return load_flux_2_vae(self.ae, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        assert self.config is not None
        return materialise(on_meta_device(Flux2, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: Flux2Options) -> tuple[Flux2Loader, Release]:
    """Open the files that the options name; only headers are read. Return also which FLUX.2 it is.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options, MODEL)
    weights = denoiser_of(base)
    config = configure(weights, read_config)
    release = release_of(config, options.parts.model_version, str(base.path))
    loader = loader_of(options, base, config, weights, release.encoder)
    if config.in_features != SPEC.channels:
        raise UserError(
            f"{BASE_FLAG} {base.path}: the transformer takes {config.in_features} values per token, but only "
            f"{SPEC.channels} are supported; use a checkpoint of {MODEL}"
        )
    check_encoder(release, loader.encoder_component, config)
    return loader, release


def open_encoder(options: Flux2Options, flag: str) -> Flux2Loader:
    """Open what encodes images or captions, which `flag` names if the base model is not named. Raises UserError as
    `open_loader` does, and without either."""
    if options.model.pretrained_model_name_or_path:
        return open_loader(options)[0]
    base, nothing = open_without_dit(options, flag)
    version = options.parts.model_version
    encoder = release_named(version or "dev").encoder
    if flag == FLAG:
        encoder = encoder_of(model_lookup.open_model(FLAG, str(base.path), FOLDER)[1], version)
    return loader_of(options, base, None, nothing, encoder)


def loader_of(
    options: Flux2Options, base: BaseFiles, config: Flux2Config | None, weights: Weights, encoder: TextEncoder
) -> Flux2Loader:
    texts_are_cached = config is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = config is None or options.caching.cache_latents_to_disk
    dtype = DTYPES[options.precision.mixed_precision]
    name = options.parts.text_encoder
    return Flux2Loader(
        path=base.path,
        config=config,
        denoiser_weights=weights,
        encoder=encoder,
        encoder_component=open_if_there(texts_are_cached, lambda: open_text_encoder(name, base, encoder)),
        ae=open_if_there(latents_are_cached, lambda: open_vae(MODEL, options.model.vae, base)),
        dtype=dtype,
        text_dtype=text_dtype_of(options),
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
        shrinks_text=options.parts.fp8_text_encoder,
    )


def denoiser_of(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return open_denoiser(list_specs(), base, "flux_2", MARK, DIFFUSERS_MARK, KEYS.from_diffusers)


def open_text_encoder(name: str | None, base: BaseFiles, encoder: TextEncoder) -> Component:
    """Open the text encoder from --text_encoder or from the base model."""
    return encoder.open(base.open_text_encoder(FLAG, name, FOLDER, encoder.prefix)[1])
