"""One call of Anima's denoiser, and how its preview pictures come about."""

from torch import Tensor, nn

from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import shift_sigmas
from library.types import Batch, Conditioning, Noised, Prompt


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """The velocity, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["prompt_embeds"],
        conditioning["attn_mask"],
        conditioning["t5_input_ids"],
        conditioning["t5_attn_mask"],
    )
    return velocity_BCHW


def preview_sampler(prompt: Prompt) -> Sampler:
    """Even noise levels, pushed toward noise by --fs of the prompt."""
    assert prompt.flow_shift is not None
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), prompt.flow_shift))
