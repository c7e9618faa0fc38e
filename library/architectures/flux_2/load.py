"""Loading of FLUX.2 checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable
from functools import partial

from torch import nn

from library.architectures.flux_2.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux_2.model import Flux2, read_config
from library.architectures.flux_2.options import Flux2Options
from library.architectures.flux_2.releases import (
    FLAG,
    Release,
    TextEncoder,
    recognise_encoder,
    recognise_release,
    release_named,
)
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure
from library.models.dit_loader import DitLoader, check_input_width, open_dit, open_dit_loader, open_encoder_files
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load
from library.models.loading import Component, check_text_width
from library.models.qwen3 import FOLDER
from library.models.vae.flux_2 import PACKED_CHANNELS, load_flux_2_vae, open_vae

MODEL = "FLUX.2"
MARK = "single_stream_modulation.lin.weight"


def open_loader(options: Flux2Options) -> tuple[DitLoader, Release]:
    """Open the files that the options name; only headers are read. Return the loader and the release of FLUX.2.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    release = recognise_release(config, options.parts.model_version, str(base.path))
    loader = build_loader(options, base, weights, release.encoder, partial(Flux2, config))
    check_input_width(base.path, config.in_features, PACKED_CHANNELS, "token", MODEL)
    encoder = release.encoder
    check_text_width(FLAG, loader.text.component, WORDS, config.text_width, encoder.hub_name, len(encoder.layers))
    return loader, release


def open_encoder(options: Flux2Options, flag: str) -> tuple[DitLoader, TextEncoder]:
    """Open the models for a caching command: the whole base model if it is given, else only the encoder of `flag`.

    Return the loader and the text encoder. Raises UserError like `open_loader`, or if neither is given.
    """
    if options.model.pretrained_model_name_or_path:
        loader, release = open_loader(options)
        return loader, release.encoder
    base, nothing = open_encoder_files(options.model, options.parts.text_encoder, flag)
    version = options.parts.model_version
    # For latents only the VAE is opened, so any text encoder will do.
    encoder = release_named(version or "dev").encoder
    if flag == FLAG:
        encoder = recognise_encoder(model_lookup.open_model(FLAG, str(base.path), FOLDER)[1], version)
    return build_loader(options, base, nothing, encoder), encoder


def build_loader(
    options: Flux2Options,
    base: BaseFiles,
    weights: Weights,
    encoder: TextEncoder,
    build: Callable[[], nn.Module] | None = None,
) -> DitLoader:
    load_text = choose_load(encoder.load, encoder.name, options.parts.fp8_text_encoder)
    return open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[(lambda: open_text_encoder(options.parts.text_encoder, base, encoder), load_text)],
        vae=lambda: open_vae(MODEL, options.model.vae, base),
        load_vae=load_flux_2_vae,
    )


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return open_denoiser(list_specs(), base, "flux_2", MARK, DIFFUSERS_MARK, KEYS.from_diffusers)


def open_text_encoder(name: str | None, base: BaseFiles, encoder: TextEncoder) -> Component:
    return encoder.open(base.open_text_encoder(FLAG, name, FOLDER, encoder.prefix)[1])
