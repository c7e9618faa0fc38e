"""Loading of Z-Image checkpoints: three files, one file with everything, or a diffusers folder."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.specs import list_specs
from library.architectures.zimage.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.zimage.model import PATCH, ZImage, ZImageConfig, read_config
from library.architectures.zimage.options import ZImageOptions
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure, selected
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.dit import open_dit, open_without_dit, text_dtype_of
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, store_in_8_bits
from library.models.loading import (
    Component,
    MaybeComponent,
    check_text_width,
    first_side,
    materialise,
    on_meta_device,
    open_if_there,
)
from library.models.qwen3 import FOLDER, Qwen3Release, load_qwen3, qwen3_component
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae, vae_dtype_of
from library.options.model import BASE_FLAG

MODEL = "Z-Image"
QWEN3 = Qwen3Release("--text_encoder", "Qwen/Qwen3-4B", "text_encoders.qwen3_4b.transformer.model.")
MARK = "cap_pad_token"
UNUSED = "norm_final.weight"  # in checkpoints, but unused by the model


@dataclass(frozen=True)
class ZImageLoader:
    """The three models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: ZImageConfig | None  # None without a denoiser, for the caching commands
    denoiser_weights: Weights
    qwen3: MaybeComponent
    ae: MaybeComponent
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    shrinks_text: bool  # the text encoder is kept in 8 bits

    @property
    def num_words(self) -> int | None:
        """The size of Qwen3's vocabulary, or None if its files are missing."""
        return first_side(self.qwen3, WORDS)

    def text_encoders(self) -> list[nn.Module]:
        encoder = load_qwen3(self.qwen3, self.text_dtype)
        if self.shrinks_text:
            store_in_8_bits(encoder, "Qwen3")
        return [encoder]

    def vae(self) -> nn.Module:
        return load_vae(self.ae, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        assert self.config is not None
        return materialise(on_meta_device(ZImage, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: ZImageOptions) -> ZImageLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options, MODEL)
    weights = denoiser_of(base)
    config = configure(weights, read_config)
    loader = loader_of(options, base, config, weights)
    check_fit(loader, config)
    return loader


def open_encoder(options: ZImageOptions, flag: str) -> ZImageLoader:
    """Open what encodes images or captions, which `flag` names if the base model is not named. Raises UserError as
    `open_loader` does, and without either."""
    if options.model.pretrained_model_name_or_path:
        return open_loader(options)
    base, nothing = open_without_dit(options, flag)
    return loader_of(options, base, None, nothing)


def loader_of(options: ZImageOptions, base: BaseFiles, config: ZImageConfig | None, weights: Weights) -> ZImageLoader:
    encoder, ae = options.parts.text_encoder, options.model.vae
    texts_are_cached = config is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = config is None or options.caching.cache_latents_to_disk
    dtype = DTYPES[options.precision.mixed_precision]
    return ZImageLoader(
        path=base.path,
        config=config,
        denoiser_weights=weights,
        qwen3=open_if_there(texts_are_cached, lambda: open_qwen3(encoder, base)),
        ae=open_if_there(latents_are_cached, lambda: open_ae(MODEL, ae, base, "--vae")),
        dtype=dtype,
        text_dtype=text_dtype_of(options),
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
        shrinks_text=options.parts.fp8_llm,
    )


def denoiser_of(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = open_denoiser(list_specs(), base, "zimage", MARK, DIFFUSERS_MARK, KEYS.from_diffusers)
    return selected(weights, {key: key for key in weights.shapes if key != UNUSED})


def open_qwen3(name: str | None, base: BaseFiles) -> Component:
    """Open Qwen3 from --text_encoder or from the base model."""
    _, weights = base.open_text_encoder(QWEN3.flag, name, FOLDER, QWEN3.prefix)
    return qwen3_component(weights, QWEN3)


def check_fit(loader: ZImageLoader, config: ZImageConfig) -> None:
    """Raise UserError if the parts do not fit together."""
    if config.in_features != CHANNELS * PATCH**2:
        raise UserError(
            f"{BASE_FLAG} {loader.path}: the transformer takes {config.in_features} values per patch, but only "
            f"{CHANNELS * PATCH**2} are supported; use a checkpoint of Z-Image"
        )
    check_text_width(QWEN3.flag, loader.qwen3, WORDS, config.text_width, QWEN3.hub_name)


def is_turbo(version: str | None, given: str) -> bool:
    """Return True for a distilled checkpoint. Turbo and Base have the same names and shapes, so --model_version says
    which it is, or else the word "turbo" in the name that was `given` or that of its folder, without "de" before it."""
    if version is not None:
        return version == "turbo"
    path = Path(given).expanduser().absolute()
    name = f"{path.parent.name}/{path.name}".lower()
    return re.search(r"(?<![a-z])turbo", name) is not None and re.search(r"de[-_ ]?turbo", name) is None
