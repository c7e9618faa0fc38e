"""Assembly of Z-Image: a transformer of one stream, Qwen3 4B as text encoder, 16-channel latents.

Start here to read this package.
"""

import logging
from functools import partial

from library.architectures.specs import list_specs
from library.architectures.zimage.load import FILES, open_loader
from library.architectures.zimage.options import ZImageOptions
from library.architectures.zimage.text import NUM_TOKENS, build_chat_text
from library.diffusion.flow import FlowMatching, build_sampled_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.adapter_views import view_denoiser
from library.models.distilled import DistilledRelease, is_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, cache_text, load_tokenizer, open_for_caching, open_vae_alone
from library.models.language_models import FLAG, ChatText
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
open_vae = partial(open_vae_alone, FILES, open_loader)


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


def build_for_caching(options: ZImageOptions) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    return assemble(options, open_for_caching(FILES, open_loader, options, FLAG), turbo=False)


def assemble(options: ZImageOptions, loader: DitLoader, turbo: bool) -> Architecture:
    text = build_chat_text(load_tokenizer(FILES.encoder, options, loader))
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
        text_cache=cache_text(FILES, options, loader, text, "_zimage_te.npz"),
    )


def build_objective(options: ZImageOptions) -> FlowMatching:
    # The model predicts toward the image, the opposite of most flow models.
    return build_sampled_flow(options, options.flow_prediction.model_prediction_type, target_kind="latent - noise")


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
