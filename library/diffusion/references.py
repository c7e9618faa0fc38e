"""Reference images of edit models on their way to the denoiser: features named by their number, clean latents."""

from collections.abc import Sequence

from torch import Tensor

from library.types import Conditioning

FEATURE = "reference_"  # and the number from 0; keys in a batch's conditioning


def reference_features(latents: Sequence[Tensor]) -> Conditioning:
    """Return the normalized latents of reference images, BCHW each, in their order, as conditioning."""
    return {f"{FEATURE}{r}": latents_BCHW for r, latents_BCHW in enumerate(latents)}


def references_in(conditioning: Conditioning) -> list[Tensor]:
    """Return the latents of the reference images in a batch's conditioning, BCHW each, in their order."""
    return [conditioning[f"{FEATURE}{r}"] for r in range(sum(name.startswith(FEATURE) for name in conditioning))]
