"""One call of HunyuanImage 2.1's denoiser, and how its preview pictures come about."""

from torch import Tensor, nn

from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import shift_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The velocity, noise - latent, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.timesteps_B,
        conditioning["vlm_embed"],
        conditioning["vlm_mask"],
        conditioning["byt5_embed"],
        conditioning["byt5_mask"],
    )
    return velocity_BCHW


def preview_sampler(prompt: Prompt) -> Sampler:
    """Euler steps along even noise levels that --fs of the prompt pushes toward noise."""
    assert prompt.flow_shift is not None
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), prompt.flow_shift))
