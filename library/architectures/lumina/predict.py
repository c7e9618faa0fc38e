"""One call of Lumina Image 2.0's denoiser, and how its preview pictures come about.

The denoiser's time runs the other way and it predicts latent - noise: samplers get the negative of that.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from library.diffusion.flow import FlowMatching
from library.diffusion.flow_levels import check_shift, shift_sigmas
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def velocity(denoiser: nn.Module, noised: Noised, conditioning: Conditioning) -> Tensor:
    """latent - noise, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW, 1 - noised.sigmas_B, conditioning["hidden_state"], conditioning["attention_mask"]
    )
    return velocity_BCHW


@dataclass(frozen=True)
class LuminaPredict:
    """What the objective compares with its target."""

    objective: FlowMatching

    def __call__(self, denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        return self.objective.estimate(velocity(denoiser, noised, conditioning), noised)


def predict_for_preview(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """noise - latent, which samplers follow."""
    return -velocity(denoiser, noised, conditioning)


def preview_sampler(prompt: Prompt) -> Sampler:
    """Even noise levels, pushed toward noise. Raises ValueError for a shift that makes no levels."""
    shift = 1.0 if prompt.flow_shift is None else prompt.flow_shift
    check_shift("--fs of a prompt", shift)
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), shift))
