"""Assembly of FLUX.1, a transformer of double and single streams with CLIP-L, T5-XXL and 16-channel latents; and of
Chroma, its variant without CLIP-L, with an approximator that computes the modulation of all blocks.

Start here to read this package.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from library.architectures.flux.load import is_schnell, open_loader
from library.architectures.flux.merging import CHROMA_FILE, FILE, architecture_of
from library.architectures.flux.options import FluxOptions
from library.architectures.flux.predict import predict, predict_chroma, preview_sampler
from library.architectures.flux.text import FluxText, T5Text
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, build_predicted_flow
from library.models.clip.tokenizer import load_tokenizer
from library.models.clip.tokens import ClipTokens
from library.models.dit_loader import DitLoader
from library.models.recipe import build_flow_recipe, folders_of
from library.models.t5 import load_t5_tokenizer, precisions
from library.models.transformer_file import file_parts
from library.models.vae.flux import map_latents
from library.protocols import Architecture, LiveText, Preview, PromptDefaults, TextCacheSpec

logger = logging.getLogger(__name__)

T5_TOKENS_DEV, T5_TOKENS_SCHNELL = 512, 256
T5_READS_CAPTIONS: Mapping[str, Any] = {
    "weighted_captions": "T5 has no prompt weighting",
    "max_token_length": "T5 reads captions whole; use --t5xxl_max_token_length",
    "vae": "use --ae",
}
RECIPE = build_flow_recipe(
    "FLUX.1",
    "https://github.com/black-forest-labs/flux",
    "flux1",
    **T5_READS_CAPTIONS,
    records=("model_type", "apply_t5_attn_mask", "guidance_scale", *RECORDS, "text_encoder_lr"),
    clip_skip="FLUX.1 uses CLIP's pooled state",
)
CHROMA_RECIPE = build_flow_recipe(
    "Chroma",
    "https://huggingface.co/lodestones/Chroma",
    "chroma",
    **T5_READS_CAPTIONS,
    records=RECIPE.records,
    clip_skip="Chroma has no CLIP",
    clip_l="Chroma reads captions only with T5",
)
# Settings that Chroma was trained with, besides raw predictions.
CHROMA_USUAL = {"guidance_scale": 0.0, "timestep_sampling": "sigmoid"}
CODEC = map_latents("_flux.npz", max_references=1)  # Kontext, which has dev's layout, was trained with one reference
CODEC_WITHOUT_REFERENCES = map_latents("_flux.npz")  # of schnell and Chroma
LATENTS = CODEC.spec
build_objective = build_predicted_flow


def build(options: FluxOptions) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit the model of `model_type`.
    """
    return build_chroma(options) if options.parts.model_type == "chroma" else build_flux(options)


def build_flux(options: FluxOptions) -> Architecture:
    RECIPE.check(options)
    # Loss and metadata must both see the guidance, so it is set before they read the options.
    if options.guidance.guidance_loss is not None:
        options = replace(options, parts=replace(options.parts, guidance_scale=options.guidance.guidance_loss))
    loader = open_loader(options)
    text = build_text(options, loader)
    masks_text = options.parts.apply_t5_attn_mask
    schnell = is_schnell(loader.denoiser_weights)
    schnell_ignores = {"guidance_scale": "FLUX.1 schnell has no input for it"} if schnell else {}
    recipe = replace(RECIPE, ignores={**RECIPE.ignores, **schnell_ignores})
    return Architecture(
        **file_parts(
            FILE, recipe, options, loader, list_specs(), architecture=f"{architecture_of(loader.denoiser_weights)}/lora"
        ),
        text=text,
        codec=CODEC_WITHOUT_REFERENCES if schnell else CODEC,
        objective=build_objective(options),
        predict=partial(predict, guidance=options.parts.guidance_scale, masks_text=masks_text),
        preview=build_preview(text, schnell, masks_text),
        text_cache=build_text_cache(options, loader, text),
    )


def build_chroma(options: FluxOptions) -> Architecture:
    CHROMA_RECIPE.check(options)
    # Encoding, caches and metadata must all see the mask, so it is set before they read the options.
    options = with_masked_padding(options)
    warn_of_unusual(options)
    loader = open_loader(options)
    text = build_t5_text(options, loader, T5_TOKENS_DEV, ("tokenizer_2", "tokenizer"))
    return Architecture(
        **file_parts(CHROMA_FILE, CHROMA_RECIPE, options, loader, list_specs(), architecture="chroma/lora"),
        text=text,
        codec=CODEC_WITHOUT_REFERENCES,
        objective=build_objective(options),
        predict=partial(predict_chroma, guidance=options.parts.guidance_scale),
        preview=Preview(
            defaults=PromptDefaults(num_steps=20, width=512, height=512, scale=4.0, size_step=16, guidance_scale=0.0),
            text=text,
            predict=lambda prompt: partial(predict_chroma, guidance=prompt.guidance_scale or 0.0),
            sampler=lambda prompt: preview_sampler(prompt, is_shifted=True),
        ),
        text_cache=build_t5_cache(options, loader, text),
    )


def with_masked_padding(options: FluxOptions) -> FluxOptions:
    """Return the options with `apply_t5_attn_mask` set, which Chroma requires."""
    if options.parts.apply_t5_attn_mask:
        return options
    logger.info("--apply_t5_attn_mask is enabled: Chroma was trained with masked caption padding")
    return replace(options, parts=replace(options.parts, apply_t5_attn_mask=True))


def warn_of_unusual(options: FluxOptions) -> None:
    """Warn of settings that differ from those that Chroma was trained with."""
    values, declarations = options.flat(), type(options).declarations()
    for name, usual in CHROMA_USUAL.items():
        # Training by prompts alone ignores options that need images, so their values mean nothing there.
        has_effect = options.concepts is None or not declarations[name].needs_images
        if has_effect and values[name] != usual:
            logger.warning("--%s is %s; Chroma was trained with --%s %s", name, values[name], name, usual)


def build_text(options: FluxOptions, loader: DitLoader) -> FluxText:
    """Build the text pipeline. Tokenizers are searched next to the base model, T5's also next to its encoder."""
    default_length = T5_TOKENS_SCHNELL if is_schnell(loader.denoiser_weights) else T5_TOKENS_DEV
    clip = load_tokenizer(loader.path, options.model.tokenizer_cache_dir, loader.num_words)
    return FluxText(ClipTokens(clip), build_t5_text(options, loader, default_length, ("tokenizer_2",)))


def build_t5_text(options: FluxOptions, loader: DitLoader, default_length: int, folders: Sequence[str]) -> T5Text:
    """Build T5's text pipeline; `default_length` is the token limit unless an option sets it.

    The tokenizer is searched in `folders` next to the base model and the encoder.
    """
    length = options.parts.t5xxl_max_token_length
    model_folders = folders_of(loader.path, options.parts.t5xxl)
    cache_dir, num_words = options.model.tokenizer_cache_dir, loader.texts[-1].num_words
    return T5Text(
        tokenizer=load_t5_tokenizer([f / name for f in model_folders for name in folders], cache_dir, num_words),
        num_tokens=default_length if length is None else length,
        masks_padding=options.parts.apply_t5_attn_mask,
    )


def build_text_cache(options: FluxOptions, loader: DitLoader, text: FluxText) -> TextCacheSpec:
    """Return the cache format, which matches sd-scripts'; its `txt_ids` are the positions of the text tokens, all
    zero."""
    cache, (clip, t5) = build_t5_cache(options, loader, text.t5), (part.component for part in loader.texts)
    return replace(
        cache,
        keys=("l_pooled", *cache.keys),
        # A folder's configuration may name another activation than is assumed for a file, and no weight shows it.
        encoders=lambda: f"{fingerprint(clip.weights, t5.weights)} {clip.config['hidden_act']}",
        tokenizers=(text.clip.tokenizer, text.t5.tokenizer),
        constants={name: value for name, value in cache.constants.items() if name != "l_pooled"},
        live=LiveText(lambda: [loader.text.load()], ("l_pooled",), text.encode_clip, 1, excluded_by="train_t5xxl"),
    )


def build_t5_cache(options: FluxOptions, loader: DitLoader, text: T5Text) -> TextCacheSpec:
    """Return the cache format, which matches sd-scripts' with zeros for CLIP-L.

    No encoder stays in memory while outputs are cached: T5 has an adapter only on request, and then cannot be cached.
    """
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_flux_te.npz",
        keys=("t5_out", "t5_attn_mask"),
        encoders=lambda: fingerprint(loader.text.component.weights),
        settings=f"{precisions(loader.dtype)} {text.num_tokens} {text.masks_padding}",
        tokenizers=(text.tokenizer,),
        # sd-scripts takes only files with every key of FLUX.1's, though Chroma has no CLIP-L.
        constants={
            "l_pooled": torch.zeros(77, 1),
            "txt_ids": torch.zeros(text.num_tokens, 3),
            "apply_t5_attn_mask": torch.tensor(text.masks_padding),
        },
        live=LiveText(lambda: [], (), lambda encoders, tokens: {}, 0, excluded_by="train_t5xxl"),
    )


def build_preview(text: FluxText, schnell: bool, masks_text: bool) -> Preview:
    """Build the preview settings: for dev distilled guidance and a shift by the image size, for schnell neither."""
    return Preview(
        defaults=PromptDefaults(
            num_steps=20, width=512, height=512, scale=1.0, size_step=16, guidance_scale=None if schnell else 3.5
        ),
        text=text,
        predict=lambda prompt: partial(predict, guidance=prompt.guidance_scale or 0.0, masks_text=masks_text),
        sampler=lambda prompt: preview_sampler(prompt, is_shifted=not schnell),
    )
