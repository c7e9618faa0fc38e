"""Assembly of FLUX.2: a transformer of double and single streams, Qwen3 or Mistral 3 as text encoder, 128-channel
latents of 16 pixels.

Start here to read this package.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from library.architectures.flux_2.load import TRANSFORMER, files_with, open_encoder, open_loader
from library.architectures.flux_2.options import Flux2Options
from library.architectures.flux_2.predict import TRAINING_GUIDANCE, predict, preview_sampler
from library.architectures.flux_2.releases import DEV, DISTILLED_KLEIN, Release, TextEncoder, modelspec_architecture
from library.architectures.flux_2.text import NUM_TOKENS, build_chat_text
from library.diffusion.flow import build_predicted_flow
from library.models.distilled import is_distilled, warn_if_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import VAE_FLAG, build_recipe, load_tokenizer, shared_parts
from library.models.language_models import FLAG, ChatText
from library.models.vae.flux_2 import pack_latents
from library.protocols import Architecture, Preview, PromptDefaults

RECIPE = build_recipe(
    TRANSFORMER,
    "https://github.com/black-forest-labs/flux2",
    weighted_captions="its text encoders have no prompt weighting",
    clip_skip="FLUX.2 uses fixed layers of its text encoder",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.36"},  # AutoencoderKLFlux2
)
CODEC = pack_latents("_flux_2.npz", max_references=10)  # the limit that the model's authors name
LATENTS = CODEC.spec
build_objective = partial(build_predicted_flow, patch=1)
GUIDANCE = 4.0  # dev takes it as an input, klein base for classifier-free guidance


def build(options: Flux2Options) -> Architecture:
    """Assemble the model that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a file or a setting that does not fit FLUX.2.
    """
    RECIPE.check(options)
    loader, release = open_loader(options)
    version = options.parts.model_version
    chosen = None if version is None else "base" not in version
    # Every dev imitates guidance, which it takes as an input.
    distilled = warn_if_distilled(
        release is DEV or is_distilled(DISTILLED_KLEIN, chosen, loader.path),
        options.network,
        loader.path,
        f"{release.title}, which is distilled: training undoes the distillation. Train on FLUX.2 klein base, whose "
        "adapters work with the distilled klein too, or add --training_adapter with a training adapter. If it is not "
        "distilled, set --model_version",
    )
    return assemble(options, loader, release.encoder, release, distilled)


def open_vae(options: Flux2Options) -> Callable[[], nn.Module]:
    """Open the VAE for caching latents, which needs nothing else. Raises UserError like `build`."""
    return open_encoder(options, VAE_FLAG)[0].vae


def build_for_caching(options: Flux2Options) -> Architecture:
    """Assemble the model for caching captions, which needs no denoiser. Raises UserError like `build`."""
    RECIPE.check(options)
    loader, encoder = open_encoder(options, FLAG)
    # Without a denoiser the release is unknown. Nothing is drawn or saved, so DEV's settings do.
    return assemble(options, loader, encoder, DEV, distilled=True)


def assemble(
    options: Flux2Options, loader: DitLoader, encoder: TextEncoder, release: Release, distilled: bool
) -> Architecture:
    text = build_chat_text(encoder, load_tokenizer(encoder.model, options, loader))
    # The denoiser attends to padding, so all captions have one length and no mask.
    cache = {"keys": ("hidden_state",), "padding": {}, "on_host": ()}
    named = {**RECIPE.metadata, "modelspec.architecture": f"{modelspec_architecture(release)}/lora"}
    recipe = replace(RECIPE, metadata=named)
    return Architecture(
        **shared_parts(files_with(encoder), recipe, options, loader, text, "_flux_2_te.npz", **cache),
        codec=CODEC,
        objective=build_objective(options),
        predict=partial(predict, guidance=options.guidance.guidance_loss or TRAINING_GUIDANCE),
        preview=build_preview(text, release, distilled),
    )


def build_preview(text: ChatText, release: Release, distilled: bool) -> Preview:
    """Build the preview settings of a release.

    dev has the guidance that it imitates, distilled klein 4 steps without guidance, klein base classifier-free
    guidance.
    """
    has_input = release is DEV
    return Preview(
        PromptDefaults(
            4 if distilled and not has_input else 50,  # dev is distilled for guidance only, not for few steps
            1024,
            1024,
            scale=1.0 if distilled else GUIDANCE,
            size_step=LATENTS.bucket_step,
            guidance_scale=GUIDANCE if has_input else None,
        ),
        text,
        lambda prompt: partial(predict, guidance=prompt.guidance_scale or 0.0),
        preview_sampler,
    )
