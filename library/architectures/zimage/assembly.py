"""Assembly of Z-Image: a transformer of one stream, Qwen3 4B as text encoder, 16-channel latents.

Start here to read this package.
"""

import logging
from functools import partial

from library.architectures.zimage.load import FILES, open_loader
from library.architectures.zimage.options import ZImageOptions
from library.architectures.zimage.text import NUM_TOKENS, build_chat_text
from library.diffusion.flow import build_predicted_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.distilled import DistilledRelease, is_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, cache_text, load_tokenizer, shared_parts, ways_to_build
from library.models.language_models import ChatText
from library.models.next_dit import predict
from library.models.vae.flux import map_latents
from library.protocols import Architecture, Preview, PromptDefaults

logger = logging.getLogger(__name__)

TURBO = DistilledRelease("--model_version")
SAMPLING_SHIFT = 3.0  # used by the model to sample images
RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/Tongyi-MAI/Z-Image",
    weighted_captions="Qwen3 has no prompt weighting",
    clip_skip="Z-Image uses Qwen3's states before its last layer",
    num_tokens=NUM_TOKENS,
)
CODEC = map_latents("_zimage.npz", takes_mean=True)  # as diffusers' and musubi-tuner's training does
LATENTS = CODEC.spec
# The model predicts toward the image, the opposite of most flow models.
build_objective = partial(build_predicted_flow, target_kind="latent - noise")


def recognise_turbo(options: ZImageOptions, loader: DitLoader) -> bool:
    """Return True for Z-Image Turbo, and warn if it is trained without a training adapter."""
    version = options.parts.model_version
    turbo = is_distilled(TURBO, None if version is None else version == "turbo", loader.path)
    if turbo and not options.network.has_training_adapter:
        logger.warning(
            "%s is Z-Image Turbo, which is distilled: training undoes the distillation, and previews blur. Add "
            "--training_adapter with a training adapter for Turbo, or train on Z-Image or Z-Image-De-Turbo. "
            "If it is not Turbo, set --model_version",
            loader.path,
        )
    return turbo


def assemble(options: ZImageOptions, loader: DitLoader, is_trained: bool) -> Architecture:
    turbo = is_trained and recognise_turbo(options, loader)
    text = build_chat_text(load_tokenizer(FILES.encoder, options, loader))
    return Architecture(
        **shared_parts(FILES, RECIPE, options, loader),
        text=text,
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        preview=build_preview(text, turbo),
        text_cache=cache_text(FILES, options, loader, text, "_zimage_te.npz"),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)


def build_preview(text: ChatText, turbo: bool) -> Preview:
    """Build the preview settings: plain classifier-free guidance, or few steps without guidance for Turbo."""
    return Preview(
        defaults=PromptDefaults(
            8 if turbo else 50, 1024, 1024, scale=1.0 if turbo else 5.0, size_step=16, flow_shift=SAMPLING_SHIFT
        ),
        text=text,
        predict=lambda prompt: predict,
        sampler=partial(build_shifted_sampler, predicts="latent - noise"),
    )
