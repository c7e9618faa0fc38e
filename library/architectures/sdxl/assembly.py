"""Assembly of Stable Diffusion XL: diffusers' U-Net, two CLIP text encoders, 4-channel latents.

Start here to read this package.
"""

from functools import partial

from library.architectures.sdxl.layers import build_view
from library.architectures.sdxl.load import LATENT_CHANNELS, LATENT_SCALE, open_loader, recognise_unet_layout
from library.architectures.sdxl.options import SdxlOptions
from library.architectures.sdxl.predict import predict
from library.architectures.sdxl.text import CACHE_KEYS, SdxlText
from library.architectures.specs import list_specs
from library.checkpoints.weights import fingerprint
from library.diffusion.objective import build_ddpm
from library.models.clip.tokenizer import load_tokenizer
from library.models.clip.tokens import CHUNK_TOKENS, ClipTokens
from library.models.recipe import Recipe
from library.models.unet.preview import build_unet_preview
from library.models.unet.unet import run_unet_blocks_with, unet_chains, unet_stacks
from library.models.unet_loader import UnetLoader
from library.models.vae.latents import KlLatents
from library.protocols import Architecture, LatentSpec, TextCacheSpec

LATENTS = LatentSpec(
    channels=LATENT_CHANNELS, downscale=8, bucket_step=32, cache_suffix="_sdxl.npz", had_keys_without_size=True
)


RECIPE = Recipe(
    title="SDXL",
    metadata={
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": "1024x1024",
    },
    refuses={"v2": "it is for Stable Diffusion 2.x, which train_network.py trains"},
    ignores={"clip_skip": "SDXL always uses the second-to-last layer of both text encoders"},
)


def build(options: SdxlOptions) -> Architecture:
    """Assemble the SDXL checkpoint that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a checkpoint or a setting that does not fit SDXL.
    """
    RECIPE.check(options)
    loader = open_loader(options)
    text = build_text(options, loader)
    call = partial(predict, uses_real_crops=options.sizes.correct_crop_coordinates)
    return Architecture(
        name="sdxl",
        load=loader,
        text=text,
        codec=KlLatents(LATENTS, LATENT_SCALE),
        objective=build_ddpm(options.noise, options.loss, options.model.v_parameterization),
        predict=call,
        view=build_view(recognise_unet_layout(loader.parts.unet)),
        preview=build_unet_preview(
            options.preview.sample_sampler,
            options.model.v_parameterization,
            options.noise.zero_terminal_snr,
            text.with_emphasis(),
            call,
        ),
        metadata=RECIPE.describe(options, prediction_type="v" if options.model.v_parameterization else "epsilon"),
        specs=list_specs(),
        ignores=RECIPE.ignores,
        text_cache=build_text_cache(options, loader, text),
        run_blocks_with=run_unet_blocks_with,
        stacks=unet_stacks,
        chains=unet_chains,
        inpaints=loader.inpaints,
        # Its activations exceed float16's largest value, so latents become NaN; there are VAEs fixed for fp16.
        vae_overflows_in_fp16=True,
        tells_sizes=True,
    )


def build_text(options: SdxlOptions, loader: UnetLoader) -> SdxlText:
    """Build the text pipeline for `max_token_length` and `weighted_captions`."""
    model = options.model
    tokenizer = load_tokenizer(loader.path, model.tokenizer_cache_dir, loader.num_words)
    num_chunks = (model.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS
    return SdxlText(ClipTokens(tokenizer, num_chunks, model.weighted_captions))


def build_text_cache(options: SdxlOptions, loader: UnetLoader, text: SdxlText) -> TextCacheSpec:
    """Return the cache format of both text encoders' outputs."""
    model = options.model
    return TextCacheSpec(
        options=options.text_caching,
        suffix="_te_outputs.npz",
        keys=CACHE_KEYS,
        encoders=lambda: fingerprint(*(clip.weights for clip in loader.parts.clips)),
        settings=f"{loader.dtype} {model.max_token_length or CHUNK_TOKENS} {model.weighted_captions}",
        tokenizers=(text.tokens.tokenizer,),
    )
