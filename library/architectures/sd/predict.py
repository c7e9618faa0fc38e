"""Prediction by Stable Diffusion's U-Net."""

from torch import Tensor, nn

from library.models.unet.unet import unet_input
from library.types import Batch, Conditioning, Noised


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the predicted noise, or velocity for a v-prediction model, in the shape of the latents."""
    prediction_BCHW: Tensor = denoiser(
        unet_input(noised, conditioning), noised.timesteps_B, encoder_hidden_states=conditioning["hidden_state"]
    ).sample
    return prediction_BCHW
