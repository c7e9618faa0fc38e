"""Assembly of Z-Image: a transformer of one stream, Qwen3 4B as text encoder, 16-channel latents.

Start here to read this package.
"""

import logging
from collections.abc import Callable
from functools import partial

from torch import nn

from library.architectures.specs import list_specs
from library.architectures.zimage.load import QWEN3, TURBO, open_encoder, open_loader
from library.architectures.zimage.options import ZImageOptions
from library.architectures.zimage.text import BEGIN, END, build_chat_text
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.adapter_views import view_denoiser
from library.models.distilled import is_distilled
from library.models.dit_loader import DitLoader
from library.models.language_models import ChatText
from library.models.next_dit import predict
from library.models.qwen3 import load_qwen3_tokenizer
from library.models.recipe import Recipe, ignored_by_flow, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.models.vae.flux import map_latents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

logger = logging.getLogger(__name__)

SAMPLING_SHIFT = 3.0  # used by the model to sample images
RECIPE = Recipe(
    title="Z-Image",
    metadata={
        "ss_base_model_version": "zimage",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.implementation": "https://github.com/Tongyi-MAI/Z-Image",
        "modelspec.resolution": "1024x1024",
    },
    refuses={
        "weighted_captions": "Qwen3 has no prompt weighting",
        "network_train_text_encoder_only": "its text encoder cannot be trained",
    },
    ignores=ignored_by_flow(
        "Z-Image",
        clip_skip="Z-Image uses Qwen3's states before its last layer",
        max_token_length="its text encoder reads 512 tokens",
    ),
    records=RECORDS,
)
CODEC = map_latents("_zimage.npz", takes_mean=True)  # as diffusers' and musubi-tuner's training does
LATENTS = CODEC.spec


def build(options: ZImageOptions) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Z-Image.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    version = options.parts.model_version
    turbo = is_distilled(TURBO, None if version is None else version == "turbo", loader.path)
    if turbo and not options.network.has_training_adapter:
        logger.warning(
            "%s is Z-Image Turbo, which is distilled: training undoes the distillation, and previews blur. Add "
            "--training_adapter with a training adapter for Turbo, or train on Z-Image or Z-Image-De-Turbo. "
            "If it is not Turbo, set --model_version",
            loader.path,
        )
    return assemble(options, loader, turbo)


def open_vae(options: ZImageOptions) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, "--vae").vae


def build_for_caching(options: ZImageOptions) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_encoder(options, QWEN3.flag), turbo=False)


def assemble(options: ZImageOptions, loader: DitLoader, turbo: bool) -> Architecture:
    text = build_text(options, loader)
    return Architecture(
        name="zimage",
        load=loader,
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        view=view_denoiser,
        preview=build_preview(text, turbo),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores=RECIPE.ignores,
        text_cache=build_text_cache(options, loader, text),
    )


def build_objective(options: ZImageOptions) -> FlowMatching:
    # The model predicts toward the image, the opposite of most flow models.
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type, target_kind="latent - noise")


def build_text(options: ZImageOptions, loader: DitLoader) -> ChatText:
    """Build the text pipeline; its tokenizer is searched next to the base model and the encoder."""
    folders = tokenizer_folders(loader.path, options.parts.text_encoder)
    tokenizer = load_qwen3_tokenizer(QWEN3, folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, (BEGIN, END), QWEN3.hub_name)
    return build_chat_text(tokenizer)


def build_text_cache(options: ZImageOptions, loader: DitLoader, text: ChatText) -> TextCacheSpec:
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_zimage_te.npz",
        keys=("hidden_state", "attention_mask"),
        encoders=lambda: fingerprint(loader.text.component.weights),
        settings=f"{loader.text.dtype} {options.parts.fp8_llm}",
        tokenizers=(text.tokenizer,),
        padding={"hidden_state": 0.0, "attention_mask": 0.0},
        on_host=("attention_mask",),
        can_train=False,
    )


def build_preview(text: ChatText, turbo: bool) -> Preview:
    """Build the preview settings: plain classifier-free guidance, or few steps without guidance for Turbo."""
    return Preview(
        defaults=PromptDefaults(
            num_steps=8 if turbo else 50,
            width=1024,
            height=1024,
            scale=1.0 if turbo else 5.0,
            size_step=16,
            flow_shift=SAMPLING_SHIFT,
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=partial(build_shifted_sampler, predicts="latent - noise"),
    )
