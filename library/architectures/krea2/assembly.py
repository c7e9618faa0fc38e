"""Assembly of Krea 2: a transformer of one stream, Qwen3-VL 4B as text encoder, Qwen-Image's latents of 16 channels. It
generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from library.architectures.krea2.load import QWEN3_VL, TURBO, open_encoder, open_loader, open_turbo
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.predict import predict, preview_sampler
from library.architectures.krea2.text import LAYERS, MARKS, Krea2Text
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.models.adapter_views import view_denoiser
from library.models.distilled import is_distilled
from library.models.dit_loader import DitLoader
from library.models.qwen3 import load_qwen3_tokenizer
from library.models.recipe import Recipe, ignored_by_flow, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.models.vae.qwen_image import qwen_image_latents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

logger = logging.getLogger(__name__)

RECIPE = Recipe(
    title="Krea 2",
    metadata={
        "ss_base_model_version": "krea2",
        "modelspec.architecture": "Krea-2/lora",
        "modelspec.implementation": "https://github.com/krea-ai/krea-2",
        "modelspec.resolution": "1024x1024",
    },
    refuses={
        "weighted_captions": "Qwen3-VL has no prompt weighting",
        "network_train_text_encoder_only": "its text encoder cannot be trained",
    },
    ignores=ignored_by_flow(
        "Krea 2",
        clip_skip="Krea 2 uses fixed layers of its text encoder",
        max_token_length="its text encoder reads 512 tokens",
    ),
    records=RECORDS,
    needs={"diffusers": ">=0.35", "transformers": ">=4.57"},  # AutoencoderKLQwenImage, Qwen3VLTextModel
)
CODEC = qwen_image_latents("_krea2.npz", max_references=10)  # the model has no limit of its own
LATENTS = CODEC.spec
GUIDANCE = 5.5  # of Raw: diffusers' pipeline has 4.5, to which it adds 1


def build(options: Krea2Options) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Krea 2.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    variant = options.parts.dit_variant
    turbo = is_distilled(TURBO, None if variant is None else variant == "turbo", loader.path)
    if turbo and not options.network.has_training_adapter:
        logger.warning(
            "%s is Krea 2 Turbo, which is distilled: training undoes the distillation, and previews blur. Train on "
            "Krea 2 Raw, whose adapters work with Turbo too, or add --training_adapter with a training adapter. "
            "If it is Raw, set --dit_variant raw",
            loader.path,
        )
    return assemble(options, loader, turbo, open_turbo(options, loader))


def open_vae(options: Krea2Options) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, "--vae").vae


def build_for_caching(options: Krea2Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_encoder(options, QWEN3_VL.flag), turbo=False)


def assemble(
    options: Krea2Options, loader: DitLoader, turbo: bool, turbo_loader: DitLoader | None = None
) -> Architecture:
    text = build_text(options, loader)
    return Architecture(
        name="krea2",
        load=loader,
        text=text,
        codec=replace(CODEC, spec=replace(LATENTS, needs_references=options.parts.edit)),
        objective=build_objective(options),
        predict=predict,
        view=view_denoiser,
        preview=build_preview(text, turbo, turbo_loader),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores=RECIPE.ignores,
        text_cache=build_text_cache(options, loader, text),
    )


def build_objective(options: Krea2Options) -> FlowMatching:
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type)


def build_text(options: Krea2Options, loader: DitLoader) -> Krea2Text:
    """Build the text pipeline; its tokenizer is searched next to the base model and the encoder."""
    folders = tokenizer_folders(loader.path, options.parts.text_encoder)
    tokenizer = load_qwen3_tokenizer(QWEN3_VL, folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, MARKS, QWEN3_VL.hub_name)
    return Krea2Text(tokenizer)


def build_text_cache(options: Krea2Options, loader: DitLoader, text: Krea2Text) -> TextCacheSpec:
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_krea2_te.npz",
        keys=("hidden_state", "attention_mask"),
        encoders=lambda: fingerprint(*(part.component.weights for part in loader.texts)),
        settings=f"{loader.text.dtype} {options.parts.fp8_text_encoder}",
        tokenizers=(text.tokenizer,),
        padding={"hidden_state": 0.0, "attention_mask": 0.0},
        on_host=("attention_mask",),
        can_train=False,
        bytes_of=lambda caption: feature_bytes(loader, text, caption),
        keeps_bits=True,
        sees_images=True,
    )


def feature_bytes(loader: DitLoader, text: Krea2Text, caption: str) -> int:
    """Return the bytes of a caption's features: 61,440 for each token in 16 bits."""
    num_tokens = min(text.count_tokens(caption), text.max_tokens) + len(text.end)
    width: int = loader.text.component.config["hidden_size"]
    return num_tokens * len(LAYERS) * width * loader.text.dtype.itemsize


def build_preview(text: Krea2Text, turbo: bool, turbo_loader: DitLoader | None) -> Preview:
    """Build the preview settings: plain classifier-free guidance, or few steps without guidance for Turbo.

    `turbo_loader` loads Turbo's weights, with which previews are then drawn.
    """
    turbo = turbo or turbo_loader is not None
    return Preview(
        defaults=PromptDefaults(
            num_steps=8 if turbo else 28,
            width=1024,
            height=1024,
            scale=1.0 if turbo else GUIDANCE,
            size_step=LATENTS.bucket_step,
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=partial(preview_sampler, is_turbo=turbo),
        load_denoiser=None if turbo_loader is None else turbo_loader.denoiser,
    )
