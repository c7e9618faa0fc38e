"""Prediction by the denoiser of MOSS-Image."""

from collections.abc import Collection

from torch import Tensor, nn

from library.diffusion.references import references_in
from library.types import Batch, Conditioning, Noised

SKIPPED = (22,)  # blocks that the model's pipeline leaves out for the negative prompt


def predict(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, skipped: Collection[int] = ()
) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents. Blocks `skipped` have no effect."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["hidden_state"],
        conditioning["attention_mask"],
        references_in(conditioning),
        skipped,
    )
    return velocity_BCHW
