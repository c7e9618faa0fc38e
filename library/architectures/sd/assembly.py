"""Assembly of Stable Diffusion 1.x and 2.x: diffusers' U-Net, one CLIP text encoder, 4-channel latents.

Start here to read this package.
"""

import logging

from library.architectures.sd.layers import view
from library.architectures.sd.load import LATENT_CHANNELS, LATENT_SCALE, open_loader
from library.architectures.sd.predict import predict
from library.architectures.sd.text import ClipText
from library.architectures.specs import list_specs
from library.base.errors import about
from library.diffusion.objective import build_ddpm
from library.models.clip.tokenizer import load_tokenizer
from library.models.clip.tokens import CHUNK_TOKENS, OPEN_CLIP_PAD, ClipTokens
from library.models.shapes import count
from library.models.unet.preview import build_unet_preview
from library.models.unet.unet import run_unet_blocks_with, unet_chains, unet_stacks
from library.models.unet_loader import UnetLoader
from library.models.vae.latents import KlLatents
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from library.protocols import Architecture, LatentSpec

logger = logging.getLogger(__name__)

LATENTS = LatentSpec(
    channels=LATENT_CHANNELS, downscale=8, bucket_step=64, cache_suffix="_sd.npz", had_keys_without_size=True
)


def build(options: TrainOptions) -> Architecture:
    """Assemble the SD 1.x or, with --v2, 2.x checkpoint that the options name; nothing is loaded yet.

    Raises UserError naming the flag for a checkpoint or a setting that does not fit.
    """
    loader = open_loader(options)
    text = build_text(options.model, loader)
    return Architecture(
        name="sd",
        load=loader,
        text=text,
        codec=KlLatents(LATENTS, LATENT_SCALE),
        objective=build_ddpm(options.noise, options.loss, options.model.v_parameterization),
        predict=predict,
        view=view,
        preview=build_unet_preview(
            options.preview.sample_sampler,
            options.model.v_parameterization,
            options.noise.zero_terminal_snr,
            text.with_emphasis(),
            predict,
        ),
        metadata=metadata(options.model.v2, options.model.v_parameterization),
        specs=list_specs(),
        run_blocks_with=run_unet_blocks_with,
        stacks=unet_stacks,
        chains=unet_chains,
        inpaints=loader.inpaints,
    )


def build_text(model: ModelOptions, loader: UnetLoader) -> ClipText:
    """Build the text pipeline. Raises UserError for more layers to skip than the text encoder has."""
    (clip,) = loader.parts.clips
    num_layers = count(clip.weights.shapes, r"encoder\.layers\.(\d+)\.")
    if model.clip_skip is not None and not 1 <= model.clip_skip <= num_layers:
        raise about("--clip_skip")(
            f"is {model.clip_skip}, but the text encoder has {num_layers} layers", f"use 1 to {num_layers}"
        )
    if model.v2 and (model.clip_skip or 1) > 1:
        logger.warning(
            "--clip_skip %d: SD 2.x was trained without its last layer, which is dropped already; inference programs "
            "seldom skip more",
            model.clip_skip,
        )
    tokenizer = load_tokenizer(loader.path, model.tokenizer_cache_dir, loader.num_words)
    # Config files of sd-scripts may hold limits that it never checked, such as 255, which acts as 225.
    num_chunks = (model.max_token_length or CHUNK_TOKENS) // CHUNK_TOKENS
    return ClipText(
        tokens=ClipTokens(tokenizer, num_chunks, model.weighted_captions),
        clip_skip=model.clip_skip or 1,
        pad_id=OPEN_CLIP_PAD if model.v2 else None,
    )


def metadata(is_v2: bool, predicts_velocity: bool) -> dict[str, str]:
    """Return the base model's metadata of files trained on it."""
    version = "sd_v2" if is_v2 else "sd_v1"
    architecture = "stable-diffusion-v1"
    # The 768 px release of SD 2.x predicts velocity, the 512 px one noise.
    if is_v2:
        architecture = "stable-diffusion-v2-768-v" if predicts_velocity else "stable-diffusion-v2-512"
    return {
        "ss_v2": str(is_v2),
        "ss_base_model_version": f"{version}_v" if predicts_velocity else version,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if predicts_velocity else "epsilon",
        "modelspec.resolution": "768x768" if is_v2 and predicts_velocity else "512x512",
    }
