"""One call of FLUX.1's denoiser, and how its preview pictures come about."""

import torch
from torch import Tensor, nn

from library.diffusion.noise_levels import resolution_shift, shift_sigmas
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def predict(
    denoiser: nn.Module,
    noised: Noised,
    conditioning: Conditioning,
    batch: Batch,
    *,
    guidance: float,
    masks_text: bool,
) -> Tensor:
    """The velocity, noise - latent, in the shape of the latents.

    `guidance` is what a guidance-distilled model is told; `masks_text` hides the padding behind the caption.
    """
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["t5_out"],
        conditioning["l_pooled"],
        torch.full_like(noised.sigmas_B, guidance),
        conditioning["t5_attn_mask"] if masks_text else None,
    )
    return velocity_BCHW


def preview_sampler(prompt: Prompt, is_shifted: bool) -> Sampler:
    """Even noise levels, pushed toward noise as the size of the picture asks; schnell takes them as they are."""
    sigmas_N = even_sigmas(prompt.num_steps)
    if is_shifted:
        sigmas_N = shift_sigmas(sigmas_N, resolution_shift(prompt.height // 8, prompt.width // 8))
    return FlowSampler(sigmas_N)
