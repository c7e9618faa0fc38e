"""The values of one training step.

Shapes: B samples, C channels, H height, W width, T token positions, L 77-token chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Conditioning = Mapping[str, Tensor]
"""Text features by name, first axis B; the names are the keys of the cache file."""


@dataclass(frozen=True)
class Tokens:
    """Captions as token ids, one entry for each text encoder."""

    ids_BLT: tuple[Tensor, ...]
    weights_BLT: tuple[Tensor, ...] | None = None  # emphasis of --weighted_captions, 1.0 elsewhere


@dataclass(frozen=True)
class Concept:
    """What a batch of a prompt teaches in place of pictures (LECO).

    The adapted model draws the caption from pure noise, `num_denoised` of `num_steps` steps far and guided away from
    `unconditional`. What it says there is to become what the base model says of `neutral`, moved `push` times the way
    from what that says of `unconditional` to what it says of `positive`.
    """

    positive: str
    unconditional: str
    neutral: str
    push: float  # below 0 away from it
    multiplier: float  # how strongly the adapter acts meanwhile
    num_steps: int
    num_denoised: int
    guidance: float  # of classifier-free guidance on the way; 1 is without


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket; what was not cached is None and computed in the step."""

    keys: list[str]  # the pictures' paths, for messages
    captions: list[str]
    pixels_BCHW: Tensor | None  # float32, -1..1
    latents_BCHW: Tensor | None  # as the cache keeps them, before `LatentCodec.normalize`
    conditioning: Conditioning | None
    loss_weights_B: Tensor
    masks_B1HW: Tensor | None  # float32, 0..1, in pixels of the bucket
    sizes_B6: Tensor  # original height and width, crop top and left, target height and width
    attributes: list[Mapping[str, Any]]  # custom_attributes of the subset
    crops_B2: Tensor | None = None  # where the pictures were really cut from the resized ones: top and left
    concept: Concept | None = None  # where there are no pictures, and all captions are one

    @property
    def height_width(self) -> tuple[int, int]:
        """The pixels that all its pictures have."""
        height, width = self.sizes_B6[0, 4:].tolist()
        return int(height), int(width)


@dataclass(frozen=True)
class Noised:
    """Latents on their way to noise."""

    latents_BCHW: Tensor
    clean_BCHW: Tensor
    noise_BCHW: Tensor
    sigmas_B: Tensor  # DDPM: sqrt((1 - abar) / abar); flow: the share of noise, 0..1
    timesteps_B: Tensor  # in the denoiser's own unit


@dataclass(frozen=True)
class Prompt:
    """One picture to draw during training, every setting filled in; None where the base model has no such setting."""

    text: str
    negative: str
    width: int
    height: int
    seed: int | None  # None: a stream of the run's own seed
    num_steps: int
    scale: float  # of classifier-free guidance; 1 and below are without
    sampler: str | None  # a name of library.diffusion.samplers.SAMPLERS
    guidance_scale: float | None  # what a guidance-distilled model is told
    cfg_trunc_ratio: float | None  # the share of the steps, counted from the first, that have classifier-free guidance
    renorm_cfg: float | None  # how many times as long as the unguided prediction the guided one may be; 0 is no limit
    flow_shift: float | None  # how far the noise levels of a flow model lie toward pure noise
    image_path: Path | None = None  # the picture that a model that inpaints paints anew in part
