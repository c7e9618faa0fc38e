"""Prediction by Anima's denoiser."""

from torch import Tensor, nn

from library.types import Batch, Conditioning, Noised


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["prompt_embeds"],
        conditioning["attn_mask"],
        conditioning["t5_input_ids"],
        conditioning["t5_attn_mask"],
    )
    return velocity_BCHW
