"""Assembly of FLUX.3 Image Klein: a transformer with blocks for each kind of token, then for all, Qwen3-VL 4B as text
encoder, 128-channel latents of 16 pixels. It generates images from text, and can be trained to edit reference images.

Start here to read this package.
"""

from dataclasses import replace
from functools import partial

from library.architectures.flux_3.load import FILES, open_loader
from library.architectures.flux_3.model import read_config
from library.architectures.flux_3.options import SHIFT, Flux3Options
from library.architectures.flux_3.predict import predict
from library.architectures.flux_3.text import NUM_TOKENS, build_text
from library.checkpoints.weights import configure
from library.diffusion.flow import build_predicted_flow
from library.diffusion.samplers import build_shifted_sampler
from library.models.distilled import warn_if_distilled
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import build_recipe, load_tokenizer, shared_parts, ways_to_build
from library.models.vae.flux_2 import pack_latents
from library.protocols import Architecture, Preview, PromptDefaults

RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/black-forest-labs/flux-3-image-klein",
    version="FLUX.3",
    weighted_captions="Qwen3-VL has no prompt weighting",
    clip_skip="it uses fixed layers of its text encoder",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.36", "transformers": ">=4.57"},  # AutoencoderKLFlux2, Qwen3VLTextModel
)
CODEC = pack_latents("_flux_3.npz", max_references=10)
LATENTS = CODEC.spec
build_objective = partial(build_predicted_flow, patch=1)
GUIDANCE = 3.5  # of the base model, as in ComfyUI's workflow; the model's page has 4


def recognise_distilled(options: Flux3Options, loader: DitLoader) -> bool:
    """Return True for the distilled model, and warn if it is trained without a training adapter."""
    return warn_if_distilled(
        configure(loader.denoiser_weights, read_config).has_target,
        options.network,
        loader.path,
        "the distilled FLUX.3 Image Klein: training undoes the distillation. Train on its base model, whose adapters "
        "work with the distilled one too, or add --training_adapter with a training adapter",
    )


def assemble(options: Flux3Options, loader: DitLoader, is_trained: bool) -> Architecture:
    distilled = is_trained and recognise_distilled(options, loader)
    text, edits = build_text(load_tokenizer(FILES.encoder, options, loader)), options.parts.edit
    latents = replace(LATENTS, needs_references=edits, max_references=LATENTS.max_references if edits else 0)
    return Architecture(
        **shared_parts(FILES, RECIPE, options, loader, text, "_flux_3_te.npz", keeps_bits=True),
        codec=replace(CODEC, spec=latents),
        objective=build_objective(options),
        predict=predict,
        # Classifier-free guidance, or few steps without guidance for the distilled model.
        preview=Preview(
            PromptDefaults(
                *((16, 1024, 1024, 1.0) if distilled else (50, 1024, 1024, GUIDANCE)),
                LATENTS.bucket_step,
                flow_shift=SHIFT,
            ),
            text,
            lambda prompt: partial(predict, levels=build_shifted_sampler(prompt).levels),
            build_shifted_sampler,
        ),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)
