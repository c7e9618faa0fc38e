"""The loader of base models that consist of a transformer, text encoders and a VAE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from library.base.errors import about
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.clip.clip import CLIP_WORDS
from library.models.language_models import WORDS
from library.models.loading import (
    Absent,
    Component,
    LoadPart,
    MaybeComponent,
    materialise,
    open_if_there,
    text_encoder_dtype,
)
from library.models.shapes import shape_of
from library.models.t5 import WORDS as T5_WORDS
from library.models.vae.vae import resolve_vae_dtype
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.machine.memory import PrecisionOptions
from library.options.model import BASE_FLAG, ModelOptions

EMBEDDINGS = (WORDS, T5_WORDS[0], CLIP_WORDS)  # the word embeddings of language models, T5 and CLIP


class DitLoaderOptions(Protocol):
    """The options that set the precision of the parts and allow some of them to be absent."""

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
    """A text encoder or a VAE that is loaded on request, frozen, on the CPU."""

    component: MaybeComponent
    dtype: torch.dtype
    load_as: LoadPart

    @property
    def num_words(self) -> int | None:
        """The vocabulary size of a text encoder; None if its files are missing."""
        if isinstance(self.component, Absent):
            return None
        shapes = self.component.weights.shapes
        return shape_of(shapes, next((name for name in EMBEDDINGS if name in shapes), WORDS))[0]

    def load(self) -> nn.Module:
        return self.load_as(self.component, self.dtype)


@dataclass(frozen=True)
class DitLoader:
    """The models of a checkpoint, each loaded on request, frozen, on the CPU."""

    path: Path  # the folder or file of the denoiser
    build: Callable[[], nn.Module] | None  # builds the denoiser; None for caching commands, which need none
    denoiser_weights: Weights
    dtype: torch.dtype
    texts: tuple[Part, ...]  # the models that encode captions and their images
    vae_part: Part

    @property
    def text(self) -> Part:
        return self.texts[0]

    @property
    def num_words(self) -> int | None:
        """The vocabulary size of the first text encoder; None if its files are missing."""
        return self.text.num_words

    def text_encoders(self) -> list[nn.Module]:
        return [part.load() for part in self.texts]

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
    texts: Sequence[tuple[Callable[[], Component], LoadPart]],
    text_dtype: torch.dtype | None = None,
    vae: Callable[[], Component],
    load_vae: LoadPart,
    vae_dtype: torch.dtype | None = None,
) -> DitLoader:
    """Open the text encoders and the VAE of a denoiser, each by one function that opens it and another that loads it.

    A part may be absent if its outputs are cached on disk, or if `build` is None, so there is no denoiser to train.
    Without `text_dtype` the text encoders run in bfloat16 where others run in float16, which their states overflow.
    """
    precision = options.precision.mixed_precision
    texts_are_cached = build is None or options.text_caching.cache_text_encoder_outputs_to_disk
    latents_are_cached = build is None or options.caching.cache_latents_to_disk
    return DitLoader(
        path=base.path,
        build=build,
        denoiser_weights=weights,
        dtype=DTYPES[precision],
        texts=tuple(
            Part(open_if_there(texts_are_cached, open_it), text_dtype or text_encoder_dtype(DTYPES[precision]), load)
            for open_it, load in texts
        ),
        vae_part=Part(
            open_if_there(latents_are_cached, vae), vae_dtype or resolve_vae_dtype(options.model, precision), load_vae
        ),
    )


def add_vision(loader: DitLoader, open_it: Callable[[], Component | None], load: LoadPart) -> DitLoader:
    """Add the vision model in the text encoder's files, if they have one; only reference images need it."""
    vision = None if isinstance(loader.text.component, Absent) else open_it()
    return loader if vision is None else replace(loader, texts=(*loader.texts, Part(vision, loader.text.dtype, load)))


def check_input_width(path: Path, num_inputs: int, expected: int, unit: str, title: str) -> None:
    """Raise UserError if the transformer at `path` takes another number of values per `unit` than the VAE produces."""
    if num_inputs != expected:
        raise about(BASE_FLAG, path, cause="does not fit")(
            f": the transformer takes {num_inputs} values per {unit}, but only {expected} are supported",
            f"use a checkpoint of {title}",
        )
