"""Preview images of the U-Net models."""

from library.diffusion.samplers import Sampler, build_ddpm_sampler
from library.protocols import Predict, Preview, PromptDefaults, TextPipeline
from library.types import Prompt


def build_unet_preview(
    default_sampler: str, predicts_velocity: bool, zero_terminal_snr: bool, text: TextPipeline, predict: Predict
) -> Preview:
    """Build the preview settings that diffusers' pipelines use. `text` must read prompts with emphasis."""

    def sampler(prompt: Prompt) -> Sampler:
        assert prompt.sampler is not None
        return build_ddpm_sampler(
            prompt.sampler, prompt.num_steps, predicts_velocity=predicts_velocity, zero_terminal_snr=zero_terminal_snr
        )

    return Preview(
        defaults=PromptDefaults(num_steps=30, width=512, height=512, scale=7.5, size_step=8, sampler=default_sampler),
        text=text,
        predict=lambda prompt: predict,
        sampler=sampler,
    )
