"""The releases of FLUX.2: their text encoders, and their recognition from files and --model_version."""

from dataclasses import dataclass, replace

from library.architectures.flux_2 import mistral
from library.architectures.flux_2.model import Flux2Config
from library.base.errors import about
from library.checkpoints.weights import Weights
from library.models.distilled import DistilledRelease
from library.models.language_models import FLAG, WORDS, LanguageModel, remove_last_norm, with_first_layers
from library.models.qwen3 import BEGIN, END, qwen3_encoder


@dataclass(frozen=True)
class TextEncoder:
    """A language model that encodes captions; the denoiser gets the states of some of its layers, concatenated."""

    model: LanguageModel  # without the layers after those and without its last norm
    layers: tuple[int, ...]  # layers whose states are used
    template: tuple[str, str]  # before and after a caption
    removed: str = ""  # deleted from captions


def use_layers(model: LanguageModel, layers: tuple[int, ...], marks: tuple[str, ...]) -> LanguageModel:
    """Return a language model cut after the last of `layers`, with the tokens of its template."""
    return replace(
        model,
        marks=marks,
        open=lambda config, weights: with_first_layers(model.open(config, weights), layers[-1], FLAG),
        load=lambda component, dtype: remove_last_norm(model.load(component, dtype)),
    )


def qwen3_text(size: str) -> TextEncoder:
    think, layers = "<think>", (9, 18, 27)
    # Qwen3's chat template with thinking disabled.
    template = (f"{BEGIN}user\n", f"{END}\n{BEGIN}assistant\n{think}\n\n</think>\n\n")
    return TextEncoder(use_layers(qwen3_encoder(size), layers, (BEGIN, END, think)), layers, template)


# With the line break of the reference implementation's message, in the middle of a sentence.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
MISTRAL = TextEncoder(
    use_layers(mistral.ENCODER, (10, 20, 30), mistral.ENCODER.marks),
    layers=(10, 20, 30),
    template=(f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]"),
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
KLEIN_4B = Release("klein-4b", "FLUX.2 klein 4B", 7680, qwen3_text("4B"))
KLEIN_9B = Release("klein-9b", "FLUX.2 klein 9B", 12288, qwen3_text("8B"))
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
            f"is {version}, but {origin} is the transformer of {recognised.title}, with text features of width "
            f"{config.text_width}",
            f"use --model_version {recognised.name}, or the file of {requested.title}",
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
                f"has width {width}, which is for {others[0]}, but --model_version {version} needs width "
                f"{requested.encoder_width}",
                f"use {requested.encoder.model.hub_name}",
            )
        return requested.encoder
    # Qwen3 has norms of queries and keys, Mistral has none.
    if not any(name.endswith("q_norm.weight") for name in weights.shapes):
        return MISTRAL
    return KLEIN_9B.encoder if width == KLEIN_9B.encoder_width else KLEIN_4B.encoder
