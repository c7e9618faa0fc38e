"""Prediction by the denoiser of Qwen-Image 2.1, and its preview sampler."""

from torch import Tensor, nn

from library.diffusion.references import references_in
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import QWEN_SHIFT_ENDS, resolution_shift, shift_sigmas
from library.types import Batch, Conditioning, Noised, Prompt

PIXELS_PER_TOKEN = 16
LAST_SIGMA = 0.02  # share of noise at the last level, from the scheduler's configuration


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["hidden_state"],
        conditioning["attention_mask"],
        places_in(conditioning),
        references_in(conditioning),
    )
    return velocity_BCHW


def places_in(conditioning: Conditioning) -> list[int]:
    """Return the number of text tokens before each reference image, which is the same for all samples of a batch."""
    return [int(place) for place in conditioning["image_places"][0].tolist() if place >= 0]


def preview_sampler(prompt: Prompt) -> Sampler:
    """Build a sampler on noise levels that are shifted by the image size or by --fs, then stretched so that the last
    is 0.02."""
    shift = prompt.flow_shift
    if not shift:
        sides = prompt.height // PIXELS_PER_TOKEN, prompt.width // PIXELS_PER_TOKEN
        shift = resolution_shift(*sides, QWEN_SHIFT_ENDS, patch=1)
    sigmas_N = shift_sigmas(even_sigmas(prompt.num_steps), shift)
    if prompt.num_steps > 1:  # a single level is pure noise, which stretching cannot move
        sigmas_N = 1 - (1 - sigmas_N) * (1 - LAST_SIGMA) / (1 - sigmas_N[-1])
    return FlowSampler(sigmas_N)
