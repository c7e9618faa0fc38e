"""Prediction by HunyuanImage 2.1's denoiser."""

from torch import Tensor, nn

from library.types import Batch, Conditioning, Noised


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.timesteps_B,
        conditioning["vlm_embed"],
        conditioning["vlm_mask"],
        conditioning["byt5_embed"],
        conditioning["byt5_mask"],
    )
    return velocity_BCHW
