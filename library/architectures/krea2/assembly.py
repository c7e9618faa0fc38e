"""Assembly of Krea 2: a transformer of one stream, Qwen3-VL 4B as text encoder, Qwen-Image's latents of 16 channels. It
generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

from dataclasses import replace
from functools import partial

from library.architectures.krea2.load import FILES, open_loader, open_turbo
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.predict import predict, preview_sampler
from library.architectures.krea2.text import LAYERS, NUM_TOKENS, Krea2Text
from library.diffusion.flow import build_predicted_flow
from library.models.distilled import DistilledRelease, recognise_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, load_tokenizer, shared_parts, ways_to_build
from library.models.vae.qwen_image import qwen_image_latents
from library.protocols import Architecture, Preview, PromptDefaults

TURBO = DistilledRelease(
    "--dit_variant",
    advice="Krea 2 Turbo, which is distilled: training undoes the distillation, and previews blur. Train on Krea 2 "
    "Raw, whose adapters work with Turbo too, or add --training_adapter with a training adapter. If it is Raw, set "
    "--dit_variant raw",
    base_words=frozenset(("raw",)),
)
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
build_objective = build_predicted_flow
GUIDANCE = 5.5  # of Raw: diffusers' pipeline has 4.5, to which it adds 1


def assemble(options: Krea2Options, loader: DitLoader, is_trained: bool) -> Architecture:
    turbo = is_trained and recognise_distilled(TURBO, options.parts.dit_variant, options.network, loader.path)
    turbo_loader = open_turbo(options, loader) if is_trained else None
    text = Krea2Text(load_tokenizer(FILES.encoder, options, loader))
    return Architecture(
        **shared_parts(
            FILES,
            RECIPE,
            options,
            loader,
            text,
            "_krea2_te.npz",
            bytes_of=lambda caption: feature_bytes(loader, text, caption),
            keeps_bits=True,
        ),
        codec=replace(CODEC, spec=replace(LATENTS, needs_references=options.parts.edit)),
        objective=build_objective(options),
        predict=predict,
        preview=build_preview(text, turbo, turbo_loader),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)


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
        PromptDefaults(*((8, 1024, 1024, 1.0) if turbo else (28, 1024, 1024, GUIDANCE)), LATENTS.bucket_step),
        text,
        lambda prompt: predict,
        partial(preview_sampler, is_turbo=turbo),
        load_denoiser=None if turbo_loader is None else turbo_loader.denoiser,
    )
