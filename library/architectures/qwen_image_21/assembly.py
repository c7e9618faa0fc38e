"""Assembly of Qwen-Image 2.1: a transformer of one stream, Qwen3-VL 8B as text encoder, 64-channel latents of 16
pixels. It generates RGBA images from text and edits reference images.

Start here to read this package.
"""

from functools import partial

from library.architectures.qwen_image_21.load import FILES, open_loader
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.architectures.qwen_image_21.predict import predict, preview_sampler
from library.architectures.qwen_image_21.text import NO_PLACE, NUM_TOKENS, QwenImage21Text
from library.architectures.qwen_image_21.vae import SPEC, decode_rgba, encode_rgba, statistics
from library.diffusion.flow import build_predicted_flow
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import PADDING, build_recipe, load_tokenizer, shared_parts, ways_to_build
from library.models.vae.latents import NormalizedLatents
from library.protocols import Architecture, Preview, PromptDefaults

RECIPE = build_recipe(
    FILES.transformer,
    "https://github.com/QwenLM/Qwen-Image-2.1",
    weighted_captions="Qwen3-VL has no prompt weighting",
    clip_skip="Qwen-Image 2.1 uses Qwen3-VL's last states",
    num_tokens=NUM_TOKENS,
    needs={"diffusers": ">=0.41", "transformers": ">=4.57"},  # AutoencoderKLQwenImage21, Qwen3-VL
)
CODEC = NormalizedLatents(SPEC, statistics, encode_rgba, decode_rgba)
LATENTS = CODEC.spec
build_objective = partial(build_predicted_flow, patch=1)


def assemble(options: QwenImage21Options, loader: DitLoader, is_trained: bool) -> Architecture:
    text = QwenImage21Text(load_tokenizer(FILES.encoder, options, loader), LATENTS.bucket_step)
    places = "image_places"
    return Architecture(
        **shared_parts(
            FILES,
            RECIPE,
            options,
            loader,
            text,
            "_qwen_image_21_te.npz",
            keys=(*PADDING, places),
            padding={**PADDING, places: NO_PLACE},
            on_host=("attention_mask", places),
            places_key=places,
        ),
        codec=CODEC,
        objective=build_objective(options),
        predict=predict,
        # As the model was made for, without guidance; 0 stands for the shift by image size.
        preview=Preview(
            PromptDefaults(40, 1024, 1024, scale=1.0, size_step=LATENTS.bucket_step, flow_shift=0.0),
            text,
            lambda prompt: predict,
            preview_sampler,
        ),
    )


build, build_for_caching, open_vae = ways_to_build(FILES, RECIPE, open_loader, assemble)
