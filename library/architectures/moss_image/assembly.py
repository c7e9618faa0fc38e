"""Assembly of MOSS-Image: a transformer of one stream, Qwen3.5 9B as text encoder, 128-channel latents of 16 pixels. It
generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from library.architectures.moss_image.levels import draw_levels, preview_sampler
from library.architectures.moss_image.load import open_encoder, open_loader
from library.architectures.moss_image.options import OWN_SAMPLING, MossImageOptions
from library.architectures.moss_image.predict import SKIPPED, predict
from library.architectures.moss_image.qwen3_5 import FLAG, HUB_NAME, load_tokenizer
from library.architectures.moss_image.text import MARKS, MossImageText
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.models.adapter_views import view_denoiser
from library.models.dit_loader import DitLoader
from library.models.recipe import Recipe, ignored_by_flow, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.models.vae.flux_2 import pack_latents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

RECIPE = Recipe(
    title="MOSS-Image",
    metadata={
        "ss_base_model_version": "moss_image",
        "modelspec.architecture": "MOSS-Image/lora",
        "modelspec.implementation": "https://huggingface.co/openmoss/MOSS-Image-Base",
        "modelspec.resolution": "1024x1024",
    },
    refuses={
        "weighted_captions": "Qwen3.5 has no prompt weighting",
        "network_train_text_encoder_only": "its text encoder cannot be trained",
    },
    ignores=ignored_by_flow(
        "MOSS-Image",
        clip_skip="MOSS-Image uses Qwen3.5's last states",
        max_token_length="its text encoder reads 4096 tokens",
    ),
    records=RECORDS,
    needs={"diffusers": ">=0.36", "transformers": ">=5.3"},  # AutoencoderKLFlux2, Qwen3.5
)
# The names of sd-scripts' caches are unknown, so these differ from the pattern of its others.
CODEC = pack_latents("_moss_latents.npz", max_references=10)  # the model has no limit of its own
LATENTS = CODEC.spec


def build(options: MossImageOptions) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit MOSS-Image.
    """
    RECIPE.check(options)
    return assemble(options, open_loader(options))


def open_vae(options: MossImageOptions) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, "--vae").vae


def build_for_caching(options: MossImageOptions) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_encoder(options, FLAG))


def assemble(options: MossImageOptions, loader: DitLoader) -> Architecture:
    text = build_text(options, loader)
    return Architecture(
        name="moss_image",
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


def build_objective(options: MossImageOptions) -> FlowMatching:
    objective = build_sampled_flow(options, options.flow_prediction.model_prediction_type, patch=1)
    if options.flow_sampling.timestep_sampling != OWN_SAMPLING:
        return objective
    return replace(objective, draw_levels=draw_levels, takes_offset=False)


def build_text(options: MossImageOptions, loader: DitLoader) -> MossImageText:
    """Build the text pipeline; its tokenizer is searched next to the base model and the encoder."""
    folders = tokenizer_folders(loader.path, options.parts.text_encoder)
    tokenizer = load_tokenizer(folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, MARKS, HUB_NAME)
    return MossImageText(tokenizer)


def build_text_cache(options: MossImageOptions, loader: DitLoader, text: MossImageText) -> TextCacheSpec:
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_moss_text.npz",
        keys=("hidden_state", "attention_mask"),
        encoders=lambda: fingerprint(*(part.component.weights for part in loader.texts)),
        settings=f"{loader.text.dtype} {options.parts.fp8_text_encoder} {text.tokenizer.chat_template}",
        tokenizers=(text.tokenizer,),
        padding={"hidden_state": 0.0, "attention_mask": 0.0},
        on_host=("attention_mask",),
        can_train=False,
        sees_images=True,
    )


def build_preview(text: MossImageText) -> Preview:
    """Build the preview settings: classifier-free guidance whose negative branch leaves out a block."""
    return Preview(
        defaults=PromptDefaults(
            num_steps=50, width=1024, height=1024, scale=3.0, size_step=LATENTS.bucket_step, flow_shift=5.0
        ),
        text=text,
        predict=lambda prompt: predict,
        predict_negative=lambda prompt: partial(predict, skipped=SKIPPED),
        sampler=preview_sampler,
    )
