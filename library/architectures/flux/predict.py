"""One call of FLUX.1's denoiser, and how its preview pictures come about."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.diffusion.flow import FlowMatching
from library.diffusion.flow_levels import resolution_shift, shift_sigmas
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


@dataclass(frozen=True)
class FluxPredict:
    """The velocity, or with an objective what that compares with its target; in the shape of the latents."""

    guidance: float  # what a guidance-distilled model is told
    masks_text: bool  # whether padding behind the caption is not attended to
    objective: FlowMatching | None = None

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        velocity_BCHW: Tensor = denoiser(
            noised.latents_BCHW,
            noised.sigmas_B,
            conditioning["t5_out"],
            conditioning["l_pooled"],
            torch.full_like(noised.sigmas_B, self.guidance),
            conditioning["t5_attn_mask"] if self.masks_text else None,
        )
        return velocity_BCHW if self.objective is None else self.objective.estimate(velocity_BCHW, noised)


def preview_sampler(prompt: Prompt, is_shifted: bool) -> Sampler:
    """Even noise levels, pushed toward noise as the size of the picture asks; schnell takes them as they are."""
    sigmas_N = even_sigmas(prompt.num_steps)
    if is_shifted:
        sigmas_N = shift_sigmas(sigmas_N, resolution_shift(prompt.height // 8, prompt.width // 8))
    return FlowSampler(sigmas_N)
