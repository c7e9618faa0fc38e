"""The values of one training step.

Shapes: B samples, C channels, H height, W width, T token positions, L 77-token chunks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""Text features by name, first axis B; the names are the keys of the cache file."""
StepOf = Callable[[int], int]
"""Maps the index of a batch in its epoch to its optimizer step."""


@dataclass(frozen=True)
class Tokens:
    """Captions as token IDs, one entry per text encoder."""

    ids_BLT: tuple[Tensor, ...]
    weights_BLT: tuple[Tensor, ...] | None = None  # emphasis of `weighted_captions`, 1.0 elsewhere
    images: tuple[tuple[Tensor, ...], ...] = ()  # images that the encoder sees with each caption, CHW, -1..1


class CaptionWithImages(str):
    """A caption for a text encoder that also sees the reference images.

    The text ends in a digest of the images, so that features are cached per caption and images.
    """

    caption: str  # without the digest
    read: Callable[[], tuple[Tensor, ...]]  # reads the images, CHW, -1..1

    def __new__(cls, caption: str, digest: str, read: Callable[[], tuple[Tensor, ...]]) -> "CaptionWithImages":
        text = super().__new__(cls, f"{caption}\0{digest}")
        text.caption, text.read = caption, read
        return text


def plain_caption(text: str) -> str:
    """Return a caption without the digest of its images."""
    return text.caption if isinstance(text, CaptionWithImages) else text


def shown_caption(text: str) -> str:
    """Return a caption, or the text under which its features are cached, for messages: without the digest."""
    return text.partition("\0")[0]


@dataclass(frozen=True)
class Concept:
    """A concept that a batch trains by prompts instead of images (LECO).

    The adapted model denoises the caption from pure noise for `num_denoised` of `num_steps` steps, guided away from
    `unconditional`. On the resulting latents, its prediction is trained toward the base model's prediction for
    `neutral`, plus `push` times the difference of the predictions for `positive` and `unconditional`.
    """

    positive: str
    unconditional: str
    neutral: str
    push: float  # negative values erase
    multiplier: float  # strength of the adapter during training
    num_steps: int
    num_denoised: int
    guidance: float  # classifier-free guidance scale during denoising; 1 disables it


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket. Values that were not cached are None and computed in the step."""

    keys: list[str]  # the images' paths, for messages
    captions: list[str]
    pixels_BCHW: Tensor | None  # float32, -1..1
    latents_BCHW: Tensor | None  # as cached, before `LatentCodec.normalize`
    conditioning: Conditioning | None
    loss_weights_B: Tensor
    masks_B1HW: Tensor | None  # float32, 0..1, in pixels of the bucket
    sizes_B6: Tensor  # original height and width, crop top and left, target height and width
    attributes: list[Mapping[str, Any]]  # custom_attributes of the subset
    crops_B2: Tensor | None = None  # actual crop position in the resized image: top and left
    concept: Concept | None = None  # set if there are no images; all captions are then equal
    # Reference images, BCHW each, in order: pixels or cached latents, like the images. They condition an edit model; in
    # a batch of pairs they hold the partner of each image, which is not an input of the denoiser.
    reference_pixels: tuple[Tensor, ...] = ()
    reference_latents: tuple[Tensor, ...] = ()
    are_pairs: bool = False
    unconditional: Conditioning | None = None  # of --guidance_loss, cached like `conditioning`

    @property
    def height_width(self) -> tuple[int, int]:
        """The height and width of all images, in pixels."""
        height, width = self.sizes_B6[0, 4:].tolist()
        return int(height), int(width)


@dataclass(frozen=True)
class Noised:
    """Latents with noise added."""

    latents_BCHW: Tensor
    clean_BCHW: Tensor
    noise_BCHW: Tensor
    sigmas_B: Tensor  # DDPM: sqrt((1 - abar) / abar); flow: the share of noise, 0..1
    timesteps_B: Tensor  # in the denoiser's own unit


@dataclass(frozen=True)
class Prompt:
    """One image to generate during training with all settings filled in; None if the base model has no such setting."""

    text: str
    negative: str
    width: int
    height: int
    seed: int | None  # None: derived from the run's seed
    num_steps: int
    scale: float  # of classifier-free guidance; 1 and below disable it
    sampler: str | None  # a name of library.diffusion.samplers.SAMPLERS
    guidance_scale: float | None  # input of a guidance-distilled model
    cfg_trunc_ratio: float | None  # share of the first steps that use classifier-free guidance
    renorm_cfg: float | None  # limit of the guided prediction's norm, relative to the unguided one; 0: none
    flow_shift: float | None  # shift of a flow model's noise levels toward pure noise
    image_path: Path | None = None  # the image that an inpainting model repaints in part
    reference_paths: tuple[Path, ...] = ()  # reference images of an edit model
    strength: float = 1.0  # of the trained adapter
