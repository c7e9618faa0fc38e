"""One call of HunyuanImage 2.1's denoiser, and how its preview pictures come about."""

from torch import Tensor, nn

from library.architectures.interface import Predict
from library.diffusion.flow import FlowMatching
from library.diffusion.flow_levels import shift_sigmas
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def velocity_at(denoiser: nn.Module, noised: Noised, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
    """What the denoiser says at these timesteps, 0..1000: noise - latent, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        timesteps_B,
        conditioning["vlm_embed"],
        conditioning["vlm_mask"],
        conditioning["byt5_embed"],
        conditioning["byt5_mask"],
    )
    return velocity_BCHW


def velocity(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """As pictures are drawn: the denoiser is told the level as it is."""
    return velocity_at(denoiser, noised, noised.timesteps_B, conditioning)


def build_predict(objective: FlowMatching) -> Predict:
    """The call whose result the objective's target is compared with. As sd-scripts trains, the denoiser is told whole
    timesteps; the noise itself is at the exact level."""

    def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
        return objective.estimate(velocity_at(denoiser, noised, noised.timesteps_B.floor(), conditioning), noised)

    return predict


def preview_sampler(prompt: Prompt) -> Sampler:
    """Euler steps along even noise levels that --fs of the prompt pushes toward noise."""
    assert prompt.flow_shift is not None
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), prompt.flow_shift))
