"""Assembly of Stable Diffusion 3 and 3.5: our own MMDiT, two CLIP text encoders and T5, 16-channel latents.

Start here to read this package.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from library.architectures.sd3.conditioning_dropout import Variation
from library.architectures.sd3.load import LATENT_CHANNELS, LATENT_SCALE, LATENT_SHIFT, open_loader
from library.architectures.sd3.merging import FILE
from library.architectures.sd3.model import MMDiT, recognise_version
from library.architectures.sd3.options import Sd3Options
from library.architectures.sd3.positions import square_side
from library.architectures.sd3.predict import predict
from library.architectures.sd3.text import Sd3Text
from library.architectures.specs import list_specs
from library.base.errors import needing
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import SCHEME_RECORDS, FlowMatching
from library.diffusion.samplers import FlowSampler, Sampler
from library.diffusion.timesteps import FINEST_LEVEL, build_shifted_scheme, shift_sigmas, takes_offset
from library.models.clip.clip import CLIP_WORDS, PROJECTION
from library.models.clip.tokenizer import load_tokenizer
from library.models.clip.tokens import ClipTokens
from library.models.dit_loader import DitLoader
from library.models.recipe import build_flow_recipe, folders_of
from library.models.shapes import shape_of
from library.models.t5 import load_t5_tokenizer, precisions
from library.models.transformer_file import file_parts
from library.models.vae.latents import KlLatents
from library.protocols import Architecture, LatentSpec, LiveText, Preview, PromptDefaults, TextCacheSpec, leave_sizes
from library.types import Prompt

logger = logging.getLogger(__name__)

LATENTS = LatentSpec(
    channels=LATENT_CHANNELS, downscale=8, bucket_step=32, cache_suffix="_sd3.npz", had_keys_without_size=False, patch=2
)
T5_TOKENIZER = "tokenizer_3"  # a folder next to the model, named as in diffusers folders
SAMPLING_SHIFT = 3.0  # used by SD3 to sample images


RECIPE = build_flow_recipe(
    "SD3",
    "https://github.com/Stability-AI/sd3.5",
    weighted_captions="its text encoders have no prompt weighting",
    records=("apply_lg_attn_mask", "apply_t5_attn_mask", *SCHEME_RECORDS, "text_encoder_lr"),
    clip_skip="SD3 uses the second-to-last states of both CLIPs",
    max_token_length="both CLIPs read 75 tokens; use --t5xxl_max_token_length",
)


def build(options: Sd3Options) -> Architecture:
    """Assemble the SD3 or SD3.5 checkpoint that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a checkpoint or a setting that does not fit SD3.
    """
    RECIPE.check(options)
    loader, config = open_loader(options)
    text, version = build_text(options, loader), recognise_version(config)
    recipe = replace(RECIPE, metadata={**RECIPE.metadata, "ss_base_model_version": version})
    architecture = f"stable-diffusion-3-{version}/lora"
    return Architecture(
        **file_parts(FILE, recipe, options, loader, list_specs(), architecture=architecture),
        text=text,
        codec=KlLatents(LATENTS, LATENT_SCALE, LATENT_SHIFT),
        objective=build_objective(options),
        predict=predict,
        preview=build_preview(text),
        text_cache=build_text_cache(options, loader, text),
        vary=build_variation(options, loader),
        fit_to_sizes=stretch_positions if options.sd3.enable_scaled_pos_embed else leave_sizes,
    )


def stretch_positions(denoiser: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Scale the denoiser's positions to the resolutions (width, height) of the data set."""
    assert isinstance(denoiser, MMDiT)
    denoiser.scaled_sides = tuple(sorted({square_side(size, denoiser.config.patch) for size in sizes}))
    logger.info("--enable_scaled_pos_embed: positions scaled to squares of %s patches", denoiser.scaled_sides)


def build_text(options: Sd3Options, loader: DitLoader) -> Sd3Text:
    """Build the text pipeline with the options' limits and masks; tokenizers are searched next to the base model."""
    text, cache_dir = options.text, options.model.tokenizer_cache_dir
    clip = load_tokenizer(loader.path, cache_dir, loader.num_words)
    # Without T5 the loader has two encoders.
    t5 = None
    for part in loader.texts[2:]:
        folders = [folder / T5_TOKENIZER for folder in folders_of(loader.path, text.t5xxl)]
        t5 = load_t5_tokenizer(folders, cache_dir, part.num_words)
    return Sd3Text(ClipTokens(clip), t5, text.t5xxl_max_token_length, text.apply_lg_attn_mask, text.apply_t5_attn_mask)


def build_text_cache(options: Sd3Options, loader: DitLoader, text: Sd3Text) -> TextCacheSpec:
    """Return the cache format, which matches sd-scripts'; without T5 the files have no T5 features."""
    masks_clip, masks_t5 = text.masks_clip, text.masks_t5
    clip_keys = ("lg_out", "lg_pooled", "clip_l_attn_mask", "clip_g_attn_mask")
    t5_keys = () if text.t5_tokenizer is None else ("t5_out", "t5_attn_mask")
    clips = loader.texts[:2]
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_sd3_te.npz",
        keys=(*clip_keys, *t5_keys),
        encoders=lambda: fingerprint(*(part.component.weights for part in loader.texts)),
        settings=f"{precisions(loader.dtype)} {text.num_t5_tokens} {masks_clip} {masks_t5}",
        tokenizers=(text.clip.tokenizer, *([] if text.t5_tokenizer is None else [text.t5_tokenizer])),
        constants={"apply_lg_attn_mask": torch.tensor(masks_clip), "apply_t5_attn_mask": torch.tensor(masks_t5)},
        live=LiveText(
            lambda: [part.load() for part in clips], clip_keys, text.encode_clips, len(clips), excluded_by="train_t5xxl"
        ),
    )


def build_objective(options: Sd3Options) -> FlowMatching:
    """Build the objective, which compares an estimate of the clean latent, at noise levels of whole thousandths."""
    levels = build_shifted_scheme(options.flow, options.sd3.training_shift)
    return FlowMatching(
        options.noise,
        options.loss,
        levels,
        "latent",
        "sigma_scaled",
        options.flow.weighting_scheme,
        has_whole_timesteps=True,
        takes_offset=takes_offset(options.flow),
    )


def build_variation(options: Sd3Options, loader: DitLoader) -> Variation | None:
    """Return the random changes of the conditioning in training; None if all rates are 0."""
    text, position = options.text, options.sd3.pos_emb_random_crop_rate
    if not any((text.clip_l_dropout_rate, text.clip_g_dropout_rate, text.t5_dropout_rate, position)):
        return None
    # The features have the channels of both CLIPs side by side, and only CLIP-L's file tells where its own end.
    with needing("--clip_l_dropout_rate and similar options need CLIP-L's file to know its features"):
        clip_l = loader.text.component.weights.shapes
    return Variation(
        clip_l=text.clip_l_dropout_rate,
        clip_g=text.clip_g_dropout_rate,
        t5=text.t5_dropout_rate,
        position=position,
        clip_l_width=shape_of(clip_l, CLIP_WORDS)[1],
        clip_l_pooled_width=shape_of(clip_l, PROJECTION)[0],
    )


def build_preview(text: Sd3Text) -> Preview:
    """Build the preview settings: Euler steps from pure noise, at levels that --fs of a prompt shifts."""

    def sampler(prompt: Prompt) -> Sampler:
        assert prompt.flow_shift is not None
        return FlowSampler(sampling_sigmas(prompt.num_steps, prompt.flow_shift))

    return Preview(
        defaults=PromptDefaults(
            num_steps=30, width=512, height=512, scale=7.5, size_step=16, flow_shift=SAMPLING_SHIFT
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=sampler,
    )


def sampling_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Return decreasing shares of noise, float64: even steps from 1 to the finest level of the shifted table, shifted
    again, as SD3 was published."""
    finest = shift * FINEST_LEVEL / (1 + (shift - 1) * FINEST_LEVEL)
    return shift_sigmas(torch.linspace(1.0, finest, num_steps, dtype=torch.float64), shift)
