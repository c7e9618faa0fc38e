"""Preview images of the U-Net models."""

from library.diffusion.samplers import Sampler, build_ddpm_sampler
from library.options.train import TrainOptions
from library.protocols import Predict, Preview, PromptDefaults, TextPipeline
from library.types import Prompt


def build_unet_preview(options: TrainOptions, text: TextPipeline, predict: Predict) -> Preview:
    """Build previews that match diffusers' pipelines; `text` reads prompts with emphasis."""

    def sampler(prompt: Prompt) -> Sampler:
        assert prompt.sampler is not None
        return build_ddpm_sampler(
            prompt.sampler,
            prompt.num_steps,
            predicts_velocity=options.model.v_parameterization,
            zero_terminal_snr=options.noise.zero_terminal_snr,
        )

    return Preview(
        defaults=PromptDefaults(
            num_steps=30, width=512, height=512, scale=7.5, size_step=8, sampler=options.preview.sample_sampler
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=sampler,
    )
