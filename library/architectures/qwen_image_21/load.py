"""Loading of Qwen-Image 2.1 checkpoints: three files, one file with everything, or a diffusers folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from library.architectures.qwen_image_21.checkpoint_keys import split_gates
from library.architectures.qwen_image_21.model import QwenImage21, QwenImage21Config, read_config
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.vae import CHANNELS, load_qwen_image_21_vae, open_vae
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure
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
from library.models.qwen3 import FOLDER, Qwen3Release
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component
from library.models.qwen3_vl_vision import load_vision, vision_component
from library.models.vae.vae import vae_dtype_of
from library.options.model import BASE_FLAG

MODEL = "Qwen-Image 2.1"
QWEN3_VL = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-8B-Instruct", "text_encoders.qwen3vl_8b.transformer.model.")
MARK = "txt_in.text_norm.weight"


@dataclass(frozen=True)
class TextEncoders:
    """Qwen3-VL's language model, and its vision model if the file has one."""

    language: Component
    vision: Component | None


@dataclass(frozen=True)
class QwenImage21Loader:
    """The models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    config: QwenImage21Config | None  # None without a denoiser, for the caching commands
    denoiser_weights: Weights
    language: MaybeComponent
    vision: Component | None
    rgba_vae: MaybeComponent
    dtype: torch.dtype
    text_dtype: torch.dtype
    vae_dtype: torch.dtype
    shrinks_text: bool  # the language model is kept in 8 bits

    @property
    def num_words(self) -> int | None:
        """The size of Qwen3-VL's vocabulary, or None if its files are missing."""
        return first_side(self.language, WORDS)

    @property
    def text_weights(self) -> tuple[Weights, ...]:
        """Return the weights of the models that encode captions and references. Raises NotThere without them."""
        return (self.language.weights, *([] if self.vision is None else [self.vision.weights]))

    def text_encoders(self) -> list[nn.Module]:
        """Load the language model, and the vision model if the files have one."""
        language = load_qwen3_vl(self.language, self.text_dtype)
        if self.shrinks_text:
            store_in_8_bits(language, "Qwen3-VL")
        return [language, *([] if self.vision is None else [load_vision(self.vision, self.text_dtype)])]

    def vae(self) -> nn.Module:
        return load_qwen_image_21_vae(self.rgba_vae, self.vae_dtype)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        assert self.config is not None
        return materialise(on_meta_device(QwenImage21, self.config), self.denoiser_weights, self.dtype, weight_format)


def open_loader(options: QwenImage21Options) -> QwenImage21Loader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options, MODEL)
    weights = denoiser_of(base)
    config = configure(weights, read_config)
    loader = loader_of(options, base, config, weights)
    if config.in_features != CHANNELS:
        raise UserError(
            f"{BASE_FLAG} {base.path}: the transformer takes {config.in_features} values per token, but only "
            f"{CHANNELS} are supported; use a checkpoint of {MODEL}"
        )
    check_text_width(QWEN3_VL.flag, loader.language, WORDS, config.text_width, QWEN3_VL.hub_name)
    return loader


def open_encoder(options: QwenImage21Options, flag: str) -> QwenImage21Loader:
    """Open what encodes images or captions, which `flag` names if the base model is not named. Raises UserError as
    `open_loader` does, and without either."""
    if options.model.pretrained_model_name_or_path:
        return open_loader(options)
    base, nothing = open_without_dit(options, flag)
    return loader_of(options, base, None, nothing)


def loader_of(
    options: QwenImage21Options, base: BaseFiles, config: QwenImage21Config | None, weights: Weights
) -> QwenImage21Loader:
    texts_are_cached = config is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = config is None or options.caching.cache_latents_to_disk
    name, dtype = options.parts.text_encoder, DTYPES[options.precision.mixed_precision]
    text = open_if_there(texts_are_cached, lambda: open_qwen3_vl(name, base))
    return QwenImage21Loader(
        path=base.path,
        config=config,
        denoiser_weights=weights,
        language=text.language if isinstance(text, TextEncoders) else text,
        vision=text.vision if isinstance(text, TextEncoders) else None,
        rgba_vae=open_if_there(latents_are_cached, lambda: open_vae(options.model.vae, base)),
        dtype=dtype,
        text_dtype=text_dtype_of(options),
        vae_dtype=vae_dtype_of(options.model, options.precision.mixed_precision),
        shrinks_text=options.parts.fp8_vl,
    )


def denoiser_of(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return split_gates(open_denoiser(list_specs(), base, "qwen_image_21", MARK))


def open_qwen3_vl(name: str | None, base: BaseFiles) -> TextEncoders:
    """Open Qwen3-VL from --text_encoder or from the base model."""
    config, weights = base.open_text_encoder(QWEN3_VL.flag, name, FOLDER, QWEN3_VL.prefix)
    return TextEncoders(qwen3_vl_component(weights, config, QWEN3_VL), vision_component(weights))
