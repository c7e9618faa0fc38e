"""The releases of FLUX.2: their text encoders, and their recognition from files and --model_version."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.architectures.flux_2 import mistral
from library.architectures.flux_2.model import Flux2Config
from library.base.errors import about
from library.checkpoints.weights import Weights
from library.models.distilled import DistilledRelease
from library.models.language_models import WORDS, remove_last_norm, with_first_layers
from library.models.loading import Component, MaybeComponent, materialise
from library.models.qwen3 import Qwen3Release, empty_qwen3, load_qwen3_tokenizer, qwen3_component

FLAG = "--text_encoder"


@dataclass(frozen=True)
class TextEncoder:
    """A language model that encodes captions; the denoiser gets the states of some of its layers, concatenated."""

    name: str
    hub_name: str
    prefix: str  # of its names in a file with several models
    layers: tuple[int, ...]  # layers whose states are used; later ones are not loaded
    template: tuple[str, str]  # before and after a caption
    marks: tuple[str, ...]  # tokens of the template
    component: Callable[[Weights], Component]
    empty: Callable[[Mapping[str, Any]], Any]
    load_tokenizer: Callable[[Sequence[Path], str | None, int | None], Any]
    removed: str = ""  # deleted from captions

    def open(self, weights: Weights) -> Component:
        """Build the encoder's component from shapes, without its unused layers. Raises UserError for another model."""
        return with_first_layers(self.component(weights), self.layers[-1], FLAG)

    def load(self, component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
        """Load the encoder in `dtype`, frozen, on the CPU, without its last norm."""
        return remove_last_norm(materialise(self.empty(component.config), component.weights, dtype))


def qwen3_encoder(size: str) -> TextEncoder:
    prefix = f"text_encoders.qwen3_{size.lower()}.transformer.model."
    release = Qwen3Release(FLAG, f"Qwen/Qwen3-{size}", prefix)
    begin, end, think = "<|im_start|>", "<|im_end|>", "<think>"
    return TextEncoder(
        name="Qwen3",
        hub_name=release.hub_name,
        prefix=prefix,
        layers=(9, 18, 27),
        # Qwen3's chat template with thinking disabled.
        template=(f"{begin}user\n", f"{end}\n{begin}assistant\n{think}\n\n</think>\n\n"),
        marks=(begin, end, think),
        component=lambda weights: qwen3_component(weights, release),
        empty=empty_qwen3,
        load_tokenizer=lambda *places: load_qwen3_tokenizer(release, *places),
    )


# With the line break of the reference implementation's message, in the middle of a sentence.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
MISTRAL_PREFIX = "text_encoders.mistral3_24b.transformer.model."
MISTRAL = TextEncoder(
    name="Mistral 3",
    hub_name=mistral.HUB_NAME,
    prefix=MISTRAL_PREFIX,
    layers=(10, 20, 30),
    template=(f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]"),
    marks=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    component=lambda weights: mistral.mistral_component(weights, FLAG, MISTRAL_PREFIX),
    empty=mistral.empty_mistral,
    load_tokenizer=mistral.load_mistral_tokenizer,
    # diffusers' pipeline deletes the token too, because Mistral's processor counts it as an image.
    removed="[IMG]",
)


@dataclass(frozen=True)
class Release:
    """A size of FLUX.2. Both sizes of klein exist as a distilled model and as a base."""

    name: str  # as in --model_version, without "base-"
    title: str
    text_width: int  # of the features of captions
    encoder: TextEncoder

    @property
    def encoder_width(self) -> int:
        return self.text_width // len(self.encoder.layers)


DEV = Release("dev", "FLUX.2 dev", 15360, MISTRAL)
KLEIN_4B = Release("klein-4b", "FLUX.2 klein 4B", 7680, qwen3_encoder("4B"))
KLEIN_9B = Release("klein-9b", "FLUX.2 klein 9B", 12288, qwen3_encoder("8B"))
RELEASES = (DEV, KLEIN_4B, KLEIN_9B)
DISTILLED_KLEIN = DistilledRelease("--model_version", distilled_by_default=frozenset(("klein",)))


def modelspec_architecture(release: Release) -> str:
    return f"Flux.2-{release.name}"


def release_named(version: str) -> Release:
    name = version.replace("base-", "")
    return next(release for release in RELEASES if release.name == name)


def recognise_release(config: Flux2Config, version: str | None, origin: str) -> Release:
    """Return the release of a denoiser: dev takes guidance as an input, the kleins differ in text width, and for
    unknown widths --model_version decides.

    Raises UserError if --model_version contradicts the file.
    """
    # A file without a guidance input is a klein, even if its text is as wide as dev's.
    klein = next((release for release in RELEASES if release.text_width == config.text_width), KLEIN_4B)
    recognised = DEV if config.has_guidance else KLEIN_4B if klein is DEV else klein
    if version is None:
        return recognised
    requested = release_named(version)
    is_of_known_size = config.text_width in (release.text_width for release in RELEASES)
    if (requested is DEV) != config.has_guidance or (requested is not recognised and is_of_known_size):
        raise about("--model_version")(
            f"is {version}, but {origin} is the transformer of {recognised.title}, with text features "
            f"of width {config.text_width}; use --model_version {recognised.name}, or the file of {requested.title}"
        )
    return requested


def recognise_encoder(weights: Weights, version: str | None) -> TextEncoder:
    """Return the text encoder in a file if no denoiser is given: that of --model_version, else by names and width.

    Raises UserError if its width belongs to another release than --model_version names.
    """
    width = next((shape[1] for name, shape in weights.shapes.items() if name.endswith(WORDS)), None)
    if version is not None:
        requested = release_named(version)
        others = [release.title for release in RELEASES if release is not requested and release.encoder_width == width]
        if others:
            raise about(FLAG, weights.origin, cause="does not fit")(
                f"has width {width}, which is for {others[0]}, but --model_version {version} "
                f"needs width {requested.encoder_width}; use {requested.encoder.hub_name}"
            )
        return requested.encoder
    # Qwen3 has norms of queries and keys, Mistral has none.
    if not any(name.endswith("q_norm.weight") for name in weights.shapes):
        return MISTRAL
    return KLEIN_9B.encoder if width == KLEIN_9B.encoder_width else KLEIN_4B.encoder
