"""One call of the denoiser of FLUX.1 or Chroma, and how their preview pictures come about."""

import torch
from torch import Tensor, nn

from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import resolution_shift, shift_sigmas
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


def predict_chroma(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, guidance: float
) -> Tensor:
    """The velocity of Chroma, which attends to a caption and the first padding token behind it."""
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
    """The caption's tokens and, where there is one, the padding token behind them: true for both, shape BT.

    So Chroma was trained (https://huggingface.co/lodestones/Chroma, "masking T5 padding tokens").
    """
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return places_T <= mask_BT.sum(dim=1, keepdim=True)


def preview_sampler(prompt: Prompt, is_shifted: bool) -> Sampler:
    """Even noise levels, pushed toward noise as the size of the picture asks; schnell takes them as they are."""
    sigmas_N = even_sigmas(prompt.num_steps)
    if is_shifted:
        sigmas_N = shift_sigmas(sigmas_N, resolution_shift(prompt.height // 8, prompt.width // 8))
    return FlowSampler(sigmas_N)
