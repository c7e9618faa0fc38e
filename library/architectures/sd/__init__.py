"""Stable Diffusion 1.x: U-Net of diffusers, one CLIP text encoder, 4-channel latents.

The assembly, and the table of contents of this package.
"""

from dataclasses import replace

from library.architectures.interface import Architecture, Preview, PromptDefaults
from library.architectures.sd.latents import SdLatents
from library.architectures.sd.load import SdLoader, open_loader
from library.architectures.sd.predict import predict
from library.architectures.sd.text import CHUNK_TOKENS, ClipText, load_tokenizer
from library.architectures.sd.view import view
from library.diffusion.objective import build_ddpm
from library.diffusion.samplers import Sampler, build_ddpm_sampler
from library.options.train import TrainOptions
from library.types import Prompt


def build(options: TrainOptions) -> Architecture:
    """The parts of the SD 1.x checkpoint that the options name; no model is loaded yet.

    Raises ValueError naming the flag for a checkpoint or a setting that does not fit SD 1.x.
    """
    loader = open_loader(options)
    text = build_text(options, loader)
    return Architecture(
        name="sd",
        load=loader,
        text=text,
        codec=SdLatents(),
        objective=build_ddpm(options),
        predict=predict,
        view=view,
        preview=build_preview(options, text),
        metadata=metadata(options.model.v_parameterization),
    )


def build_text(options: TrainOptions, loader: SdLoader) -> ClipText:
    """The text pipeline that --max_token_length, --clip_skip and --weighted_captions ask for."""
    model = options.model
    num_layers = loader.num_text_layers
    if model.clip_skip is not None and not 1 <= model.clip_skip <= num_layers:
        raise ValueError(
            f"--clip_skip is {model.clip_skip}, the text encoder has {num_layers} layers; use 1 to {num_layers}"
        )
    return ClipText(
        tokenizer=load_tokenizer(loader.path, model.tokenizer_cache_dir, loader.num_words),
        num_chunks=(model.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS,
        clip_skip=model.clip_skip or 1,
        reads_emphasis=model.weighted_captions,
    )


def build_preview(options: TrainOptions, text: ClipText) -> Preview:
    """Pictures as diffusers' pipeline draws them; prompts have emphasis."""

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
        text=replace(text, reads_emphasis=True),
        predict=lambda prompt: predict,
        sampler=sampler,
    )


def metadata(predicts_velocity: bool) -> dict[str, str]:
    """What files trained on this base model say about it."""
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1_v" if predicts_velocity else "sd_v1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if predicts_velocity else "epsilon",
        "modelspec.resolution": "512x512",
    }
