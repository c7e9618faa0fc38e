"""Prediction with Knots' denoiser."""

from torch import Tensor, nn

from library.types import Batch, Conditioning, Noised


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the predicted noise, in the shape of the latents."""
    prediction_BCHW: Tensor = denoiser(noised.latents_BCHW, noised.timesteps_B, conditioning["text"])
    return prediction_BCHW
