"""Prediction by Lumina Image 2.0's denoiser, and its preview sampler."""

from torch import Tensor, nn

from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import shift_sigmas
from library.errors import UserError
from library.types import Batch, Conditioning, Noised, Prompt


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity in the shape of the latents; for this model it is latent - noise, and time runs that way
    too."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW, 1 - noised.sigmas_B, conditioning["hidden_state"], conditioning["attention_mask"]
    )
    return velocity_BCHW


def preview_sampler(prompt: Prompt) -> Sampler:
    """Build a sampler on even noise levels, shifted toward noise. Raises UserError for an invalid shift."""
    shift = 1.0 if prompt.flow_shift is None else prompt.flow_shift
    if not shift > 0:
        raise UserError(f"--fs of a prompt is {shift}; use a number above 0, 1 leaves noise levels alone")
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), shift), predicts="latent - noise")
