"""The loader of base models that consist of a transformer, a text encoder and a VAE."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights
from library.errors import UserError
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.language_models import WORDS, text_encoder_dtype
from library.models.loading import Component, MaybeComponent, first_side, materialise, open_if_there
from library.models.vae.vae import resolve_vae_dtype
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.machine.memory import PrecisionOptions
from library.options.model import BASE_FLAG, ModelOptions

LoadPart = Callable[[MaybeComponent, torch.dtype], nn.Module]


class DitLoaderOptions(Protocol):
    """The options that say in which precision parts are loaded, and which of them may be absent."""

    @property
    def model(self) -> ModelOptions: ...
    @property
    def precision(self) -> PrecisionOptions: ...
    @property
    def caching(self) -> CachingOptions: ...
    @property
    def text_caching(self) -> TextCachingOptions: ...


@dataclass(frozen=True)
class Part:
    """A text encoder or a VAE, loaded on request; frozen, on the CPU."""

    component: MaybeComponent
    dtype: torch.dtype
    load_as: LoadPart

    def load(self) -> nn.Module:
        return self.load_as(self.component, self.dtype)


@dataclass(frozen=True)
class DitLoader:
    """The models, each loaded on request; frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    build: Callable[[], nn.Module] | None  # builds the denoiser; None without one, for the caching commands
    denoiser_weights: Weights
    dtype: torch.dtype
    text: Part
    vae_part: Part
    vision: Part | None = None  # the text encoder's model for reference images

    @property
    def num_words(self) -> int | None:
        """The size of the text encoder's vocabulary, or None if its files are missing."""
        return first_side(self.text.component, WORDS)

    @property
    def text_parts(self) -> list[Part]:
        """The models that encode captions and their images."""
        return [part for part in (self.text, self.vision) if part is not None]

    def text_encoders(self) -> list[nn.Module]:
        return [part.load() for part in self.text_parts]

    def vae(self) -> nn.Module:
        return self.vae_part.load()

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        assert self.build is not None
        with torch.device("meta"):
            model = self.build()
        return materialise(model, self.denoiser_weights, self.dtype, weight_format)


def open_dit_loader(
    options: DitLoaderOptions,
    base: BaseFiles,
    weights: Weights,
    build: Callable[[], nn.Module] | None,
    *,
    text: Callable[[], Component],
    load_text: LoadPart,
    text_dtype: torch.dtype | None = None,
    vae: Callable[[], Component],
    load_vae: LoadPart,
) -> DitLoader:
    """Open the `text` encoder and the `vae` beside a denoiser. Each may be absent if its outputs are cached in files,
    and if there is no denoiser to train. Without a `text_dtype` the encoder's states overflow float16."""
    precision = options.precision.mixed_precision
    texts_are_cached = build is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = build is None or options.caching.cache_latents_to_disk
    return DitLoader(
        path=base.path,
        build=build,
        denoiser_weights=weights,
        dtype=DTYPES[precision],
        text=Part(open_if_there(texts_are_cached, text), text_dtype or text_encoder_dtype(precision), load_text),
        vae_part=Part(open_if_there(latents_are_cached, vae), resolve_vae_dtype(options.model, precision), load_vae),
    )


def check_input_width(path: Path, found: int, expected: int, unit: str, title: str) -> None:
    """Raise UserError if the transformer at `path` takes another number of values per `unit` than the VAE gives."""
    if found != expected:
        raise UserError(
            f"{BASE_FLAG} {path}: the transformer takes {found} values per {unit}, but only {expected} are supported; "
            f"use a checkpoint of {title}"
        )
