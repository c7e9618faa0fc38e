"""Assembly of Krea 2: a transformer of one stream, Qwen3-VL 4B as text encoder, Qwen-Image's latents of 16 channels. It
generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

import logging
from dataclasses import replace
from functools import partial

from library.architectures.krea2.load import FILES, open_loader, open_turbo
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.predict import predict, preview_sampler
from library.architectures.krea2.text import LAYERS, NUM_TOKENS, Krea2Text
from library.architectures.specs import list_specs
from library.diffusion.flow import FlowMatching, build_sampled_flow
from library.models.adapter_views import view_denoiser
from library.models.distilled import DistilledRelease, is_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, cache_text, load_tokenizer, open_for_caching, open_vae_alone
from library.models.language_models import FLAG
from library.models.vae.qwen_image import qwen_image_latents
from library.protocols import Architecture, Preview, PromptDefaults

logger = logging.getLogger(__name__)

TURBO = DistilledRelease("--dit_variant", base_words=frozenset(("raw",)))
RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/krea-ai/krea-2",
    weighted_captions="Qwen3-VL has no prompt weighting",
    clip_skip="Krea 2 uses fixed layers of its text encoder",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.35", "transformers": ">=4.57"},  # AutoencoderKLQwenImage, Qwen3VLTextModel
)
CODEC = qwen_image_latents("_krea2.npz", max_references=10)  # the model has no limit of its own
LATENTS = CODEC.spec
open_vae = partial(open_vae_alone, FILES, open_loader)
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


def build_for_caching(options: Krea2Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_for_caching(FILES, open_loader, options, FLAG), turbo=False)


def assemble(
    options: Krea2Options, loader: DitLoader, turbo: bool, turbo_loader: DitLoader | None = None
) -> Architecture:
    text = Krea2Text(load_tokenizer(FILES.encoder, options, loader))
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
        text_cache=replace(
            cache_text(FILES, options, loader, text, "_krea2_te.npz"),
            bytes_of=lambda caption: feature_bytes(loader, text, caption),
            keeps_bits=True,
        ),
    )


def build_objective(options: Krea2Options) -> FlowMatching:
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type)


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
            8 if turbo else 28, 1024, 1024, scale=1.0 if turbo else GUIDANCE, size_step=LATENTS.bucket_step
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=partial(preview_sampler, is_turbo=turbo),
        load_denoiser=None if turbo_loader is None else turbo_loader.denoiser,
    )
