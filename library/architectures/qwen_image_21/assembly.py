"""Assembly of Qwen-Image 2.1: a transformer of one stream, Qwen3-VL 8B as text encoder, 64-channel latents of 16
pixels. It generates RGBA images from text and edits reference images.

Start here to read this package.
"""

from collections.abc import Callable

from torch import nn

from library.architectures.qwen_image_21.load import QWEN3_VL, open_encoder, open_loader
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.predict import predict, preview_sampler
from library.architectures.qwen_image_21.text import MARKS, NO_PLACE, QwenImage21Text
from library.architectures.qwen_image_21.vae import RgbaLatents
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.models.adapter_views import view_denoiser
from library.models.dit_loader import DitLoader
from library.models.qwen3 import load_qwen3_tokenizer
from library.models.recipe import Recipe, ignored_by_flow, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

RECIPE = Recipe(
    title="Qwen-Image 2.1",
    metadata={
        "ss_base_model_version": "qwen_image_21",
        "modelspec.architecture": "Qwen-Image-2.1/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image-2.1",
        "modelspec.resolution": "1024x1024",
    },
    refuses={
        "weighted_captions": "Qwen3-VL has no prompt weighting",
        "network_train_text_encoder_only": "its text encoder cannot be trained",
    },
    ignores=ignored_by_flow(
        "Qwen-Image 2.1",
        clip_skip="Qwen-Image 2.1 uses Qwen3-VL's last states",
        max_token_length="its text encoder reads 1024 tokens",
    ),
    records=RECORDS,
    needs={"diffusers": ">=0.41", "transformers": ">=4.57"},  # AutoencoderKLQwenImage21, Qwen3-VL
)
CODEC = RgbaLatents()
LATENTS = CODEC.spec


def build(options: QwenImage21Options) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit Qwen-Image 2.1.
    """
    RECIPE.check(options)
    return assemble(options, open_loader(options))


def open_vae(options: QwenImage21Options) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, "--vae").vae


def build_for_caching(options: QwenImage21Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_encoder(options, QWEN3_VL.flag))


def assemble(options: QwenImage21Options, loader: DitLoader) -> Architecture:
    text = build_text(options, loader)
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


def build_text(options: QwenImage21Options, loader: DitLoader) -> QwenImage21Text:
    """Build the text pipeline; its tokenizer is searched next to the base model and the encoder."""
    folders = tokenizer_folders(loader.path, options.parts.text_encoder, ("processor", "tokenizer"))
    tokenizer = load_qwen3_tokenizer(QWEN3_VL, folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, MARKS, QWEN3_VL.hub_name)
    return QwenImage21Text(tokenizer, LATENTS.bucket_step)


def build_text_cache(options: QwenImage21Options, loader: DitLoader, text: QwenImage21Text) -> TextCacheSpec:
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_qwen_image_21_te.npz",
        keys=("hidden_state", "attention_mask", "image_places"),
        encoders=lambda: fingerprint(*(part.component.weights for part in loader.texts)),
        settings=f"{loader.text.dtype} {options.parts.fp8_vl}",
        tokenizers=(text.tokenizer,),
        padding={"hidden_state": 0.0, "attention_mask": 0.0, "image_places": NO_PLACE},
        on_host=("attention_mask", "image_places"),
        can_train=False,
        sees_images=True,
        places_key="image_places",
    )


def build_preview(text: QwenImage21Text) -> Preview:
    """Build the preview settings that the model was made for, without guidance."""
    return Preview(
        defaults=PromptDefaults(
            num_steps=40,
            width=1024,
            height=1024,
            scale=1.0,
            size_step=LATENTS.bucket_step,
            # 0 stands for the shift by image size.
            flow_shift=0.0,
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=preview_sampler,
    )
