"""Assembly of FLUX.3 Image Klein: a transformer with blocks for each kind of token, then for all, Qwen3-VL 4B as text
encoder, 128-channel latents of 16 pixels. It generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from library.architectures.flux_3.load import MODEL, QWEN3_VL, open_encoder, open_loader
from library.architectures.flux_3.model import read_config
from library.architectures.flux_3.options import SHIFT, Flux3Options
from library.architectures.flux_3.predict import predict
from library.architectures.flux_3.text import MARKS, build_text
from library.architectures.specs import list_specs
from library.checkpoints.weights import configure, fingerprint
from library.diffusion.flow import RECORDS, FlowMatching, build_sampled_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.adapter_views import view_denoiser
from library.models.dit_loader import DitLoader
from library.models.language_models import ChatText
from library.models.qwen3 import load_qwen3_tokenizer
from library.models.recipe import Recipe, ignored_by_flow, tokenizer_folders
from library.models.tokenizer_files import check_marks
from library.models.vae.flux_2 import pack_latents
from library.protocols import Architecture, Preview, PromptDefaults, TextCacheSpec

logger = logging.getLogger(__name__)

ARCHITECTURE = "Flux.3-image-klein"
RECIPE = Recipe(
    title=MODEL,
    metadata={
        "ss_base_model_version": "FLUX.3",
        "modelspec.architecture": f"{ARCHITECTURE}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux-3-image-klein",
        "modelspec.resolution": "1024x1024",
    },
    refuses={
        "weighted_captions": "Qwen3-VL has no prompt weighting",
        "network_train_text_encoder_only": "its text encoder cannot be trained",
    },
    ignores=ignored_by_flow(
        MODEL,
        clip_skip="it uses fixed layers of its text encoder",
        max_token_length="its text encoder reads 4096 tokens",
    ),
    records=RECORDS,
    needs={"diffusers": ">=0.36", "transformers": ">=4.57"},  # AutoencoderKLFlux2, Qwen3VLTextModel
)
CODEC = pack_latents("_flux_3.npz", max_references=10)
LATENTS = CODEC.spec
GUIDANCE = 3.5  # of the base model, as in ComfyUI's workflow; the model's page has 4


def build(options: Flux3Options) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit FLUX.3 Image Klein.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    distilled = configure(loader.denoiser_weights, read_config).has_target
    if distilled and not options.network.has_training_adapter:
        logger.warning(
            "%s is the distilled FLUX.3 Image Klein: training undoes the distillation. Train on its base model, whose "
            "adapters work with the distilled one too, or add --training_adapter with a training adapter",
            loader.path,
        )
    return assemble(options, loader, distilled)


def open_vae(options: Flux3Options) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, "--vae").vae


def build_for_caching(options: Flux3Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_encoder(options, QWEN3_VL.flag), distilled=False)


def assemble(options: Flux3Options, loader: DitLoader, distilled: bool) -> Architecture:
    folders = tokenizer_folders(loader.path, options.parts.text_encoder)
    tokenizer = load_qwen3_tokenizer(QWEN3_VL, folders, options.model.tokenizer_cache_dir, loader.num_words)
    check_marks(tokenizer, MARKS, QWEN3_VL.hub_name)
    text, edits = build_text(tokenizer), options.parts.edit
    latents = replace(LATENTS, needs_references=edits, max_references=LATENTS.max_references if edits else 0)
    return Architecture(
        name="flux_3",
        load=loader,
        text=text,
        codec=replace(CODEC, spec=latents),
        objective=build_objective(options),
        predict=predict,
        view=view_denoiser,
        preview=build_preview(text, distilled),
        metadata=RECIPE.describe(options),
        specs=list_specs(),
        ignores=RECIPE.ignores,
        text_cache=build_text_cache(options, loader, text),
    )


def build_objective(options: Flux3Options) -> FlowMatching:
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type, patch=1)


def build_text_cache(options: Flux3Options, loader: DitLoader, text: ChatText) -> TextCacheSpec:
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_flux_3_te.npz",
        keys=("hidden_state", "attention_mask"),
        encoders=lambda: fingerprint(loader.text.component.weights),
        settings=f"{loader.text.dtype} {options.parts.fp8_text_encoder}",
        tokenizers=(text.tokenizer,),
        padding={"hidden_state": 0.0, "attention_mask": 0.0},
        on_host=("attention_mask",),
        can_train=False,
        keeps_bits=True,
    )


def build_preview(text: ChatText, distilled: bool) -> Preview:
    """Build the preview settings: classifier-free guidance, or few steps without guidance for the distilled model."""
    num_steps, scale = (16, 1.0) if distilled else (50, GUIDANCE)
    return Preview(
        defaults=PromptDefaults(num_steps, 1024, 1024, scale, LATENTS.bucket_step, flow_shift=SHIFT),
        text=text,
        predict=lambda prompt: partial(predict, levels=build_shifted_sampler(prompt).levels),
        sampler=build_shifted_sampler,
    )
