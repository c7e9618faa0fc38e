"""Reference images of edit models as conditioning: one feature of clean latents per image, named by its number."""

from collections.abc import Sequence

from torch import Tensor

from library.types import Conditioning

FEATURE = "reference_"  # followed by a number from 0; keys in a batch's conditioning


def reference_features(latents: Sequence[Tensor]) -> Conditioning:
    """Return the normalized latents of reference images, BCHW each, as conditioning that keeps their order."""
    return {f"{FEATURE}{r}": latents_BCHW for r, latents_BCHW in enumerate(latents)}


def references_in(conditioning: Conditioning) -> list[Tensor]:
    """Return the latents of the reference images in a batch's conditioning, BCHW each, in order."""
    return [conditioning[f"{FEATURE}{r}"] for r in range(sum(name.startswith(FEATURE) for name in conditioning))]
