"""Prediction by the denoiser of FLUX.1 or Chroma, and their preview samplers."""

import torch
from torch import Tensor, nn

from library.diffusion.references import references_in
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import resolution_shift, shift_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def predict(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, guidance: float, masks_text: bool
) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents.

    `guidance` is the input of a guidance-distilled model; `masks_text` hides caption padding.
    """
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["t5_out"],
        conditioning["l_pooled"],
        torch.full_like(noised.sigmas_B, guidance),
        conditioning["t5_attn_mask"] if masks_text else None,
        references_in(conditioning),
    )
    return velocity_BCHW


def predict_chroma(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, guidance: float
) -> Tensor:
    """Return the velocity of Chroma, which attends to a caption and the first padding token after it."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["t5_out"],
        None,
        torch.full_like(noised.sigmas_B, guidance),
        with_first_padding(conditioning["t5_attn_mask"]),
    )
    return velocity_BCHW


def with_first_padding(mask_BT: Tensor) -> Tensor:
    """Return a mask that is true for the caption's tokens and the first padding token after them, shape BT."""
    # Chroma was trained this way (https://huggingface.co/lodestones/Chroma, "masking T5 padding tokens").
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return places_T <= mask_BT.sum(dim=1, keepdim=True)


def preview_sampler(prompt: Prompt, is_shifted: bool) -> Sampler:
    """Build a sampler on even noise levels; with `is_shifted` they are shifted toward noise by the image size."""
    sigmas_N = even_sigmas(prompt.num_steps)
    if is_shifted:
        sigmas_N = shift_sigmas(sigmas_N, resolution_shift(prompt.height // 8, prompt.width // 8))
    return FlowSampler(sigmas_N)
