"""Assembly of Qwen-Image 2.1: a transformer of one stream, Qwen3-VL 8B as text encoder, 64-channel latents of 16
pixels. It generates RGBA images from text and edits reference images.

Start here to read this package.
"""

from dataclasses import replace
from functools import partial

from library.architectures.qwen_image_21.load import FILES, open_loader
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.predict import predict, preview_sampler
from library.architectures.qwen_image_21.text import NO_PLACE, NUM_TOKENS, QwenImage21Text
from library.architectures.qwen_image_21.vae import RgbaLatents
from library.architectures.specs import list_specs
from library.diffusion.flow import FlowMatching, build_sampled_flow
from library.models.adapter_views import view_denoiser
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import (
    PADDING,
    TokenizedText,
    build_recipe,
    cache_text,
    load_tokenizer,
    open_for_caching,
    open_vae_alone,
)
from library.models.language_models import FLAG
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/QwenLM/Qwen-Image-2.1",
    weighted_captions="Qwen3-VL has no prompt weighting",
    clip_skip="Qwen-Image 2.1 uses Qwen3-VL's last states",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.41", "transformers": ">=4.57"},  # AutoencoderKLQwenImage21, Qwen3-VL
)
CODEC = RgbaLatents()
LATENTS = CODEC.spec
open_vae = partial(open_vae_alone, FILES, open_loader)


def build(options: QwenImage21Options) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Qwen-Image 2.1.
    """
    RECIPE.check(options)
    return assemble(options, open_loader(options))


def build_for_caching(options: QwenImage21Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_for_caching(FILES, open_loader, options, FLAG))


def assemble(options: QwenImage21Options, loader: DitLoader) -> Architecture:
    text = QwenImage21Text(load_tokenizer(FILES.encoder, options, loader), LATENTS.bucket_step)
    return Architecture(
        name="qwen_image_21",
        load=loader,
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        view=view_denoiser,
        preview=build_preview(text),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores=RECIPE.ignores,
        text_cache=build_text_cache(options, loader, text),
    )


def build_objective(options: QwenImage21Options) -> FlowMatching:
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type, patch=1)


def build_text_cache(options: QwenImage21Options, loader: DitLoader, text: TokenizedText) -> TextCacheSpec:
    places = "image_places"
    cache = cache_text(FILES, options, loader, text, "_qwen_image_21_te.npz")
    return replace(
        cache,
        keys=(*cache.keys, places),
        padding={**PADDING, places: NO_PLACE},
        on_host=(*cache.on_host, places),
        places_key=places,
    )


def build_preview(text: QwenImage21Text) -> Preview:
    """Build the preview settings that the model was made for, without guidance."""
    return Preview(
        # 0 stands for the shift by image size.
        defaults=PromptDefaults(40, 1024, 1024, scale=1.0, size_step=LATENTS.bucket_step, flow_shift=0.0),
        text=text,
        predict=lambda prompt: predict,
        sampler=preview_sampler,
    )
