"""Loading of Lumina Image 2.0 checkpoints: three files, one file with everything, or a diffusers folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.lumina.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.lumina.gemma import gemma_component, gemma_of_folder, load_gemma
from library.architectures.lumina.model import PATCH, LuminaConfig, NextDiT, read_config
from library.architectures.lumina.options import LuminaOptions
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure, selected
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.identify import open_transformer, refuse_other_model, refuse_transformer
from library.models.loading import (
    Component,
    MaybeComponent,
    check_text_width,
    first_side,
    materialise,
    on_meta_device,
    open_if_there,
)
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae, vae_dtype_of
from library.options.model import BASE_FLAG

MODEL = "Lumina Image 2.0"
GEMMA_FLAG = "--gemma2"
GEMMA_MARK = "text_encoders.gemma2_2b."
MARK = "layers.0.attention.qkv.weight"
UNUSED = "norm_final.weight"  # in checkpoints, but unused by the model
WORDS = "embed_tokens.weight"


@dataclass(frozen=True)
class LuminaLoader:
    """The three models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: LuminaConfig
    denoiser_weights: Weights
    gemma: MaybeComponent
    ae: MaybeComponent
    dtype: torch.dtype
    vae_dtype: torch.dtype

    @property
    def num_words(self) -> int | None:
        """The size of Gemma's vocabulary, or None if its files are missing."""
        return first_side(self.gemma, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        return [load_gemma(self.gemma, self.dtype)]

    def vae(self) -> nn.Module:
        return load_vae(self.ae, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return materialise(on_meta_device(NextDiT, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: LuminaOptions) -> LuminaLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    gemma, ae = options.lumina.gemma2, options.lumina.ae
    given = {"text_encoder": gemma, "vae": ae}
    base = open_base(
        options.model.pretrained_model_name_or_path,
        "the file of Lumina's transformer, or a diffusers folder",
        [folder for folder in ("transformer", "text_encoder", "vae") if given.get(folder) is None],
    )
    weights = denoiser_of(base)
    texts_are_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    loader = LuminaLoader(
        path=base.path,
        config=configure(weights, read_config),
        denoiser_weights=weights,
        gemma=open_if_there(texts_are_cached, lambda: open_gemma(gemma, base)),
        ae=open_if_there(options.caching.cache_latents_to_disk, lambda: open_ae(MODEL, ae, base)),
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
    )
    check_fit(loader)
    return loader


def denoiser_of(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = open_transformer(list_specs(), base, "lumina")
    refuse_other_model(list_specs(), base.flag, str(base.path), (base.whole or weights).shapes, "lumina")
    if DIFFUSERS_MARK in weights.shapes:
        weights = KEYS.from_diffusers(weights)
    if MARK not in weights.shapes:
        why = f"it has no {MARK}, so it is not a {MODEL} transformer"
        refuse_transformer(list_specs(), base, base.whole or weights, "lumina", why)
    return selected(weights, {key: key for key in weights.shapes if key != UNUSED})


def open_gemma(name: str | None, base: BaseFiles) -> Component:
    """Open Gemma 2 from --gemma2 or from the base model."""
    config, weights = base.open_text_encoder(GEMMA_FLAG, name, "text_encoder", GEMMA_MARK)
    try:
        return gemma_component(weights) if config is None else gemma_of_folder(config, weights)
    except UserError as error:
        if name is None:
            raise
        raise UserError(f"{GEMMA_FLAG} {error}") from error


def check_fit(loader: LuminaLoader) -> None:
    """Raise UserError if the parts do not fit together."""
    config = loader.config
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values per patch, but only "
            f"{CHANNELS * PATCH**2} are supported; use a checkpoint of Lumina Image 2.0"
        )
    check_text_width(GEMMA_FLAG, loader.gemma, WORDS, config.text_width, "Gemma 2 2B")
