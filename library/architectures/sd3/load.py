"""Loading of Stable Diffusion 3 and 3.5 checkpoints."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from library.architectures.sd3.model import MMDiT, MMDiTConfig, read_config
from library.architectures.sd3.options import Sd3Options, Sd3TextOptions
from library.architectures.specs import list_specs
from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles, check_variant, require_base_name
from library.checkpoints.model_lookup import existing
from library.checkpoints.weights import Weights, configure, find_prefix, list_first_names, select_weights, with_prefix
from library.memory.devices import DTYPES
from library.models.clip.clip import PROJECTION, clip_component, load_clip
from library.models.dit_loader import DitLoader, open_dit_loader
from library.models.identify import DENOISER_PREFIXES, base_of_file, open_single_file, refuse_other
from library.models.loading import Component, LoadPart, MaybeComponent, check_text_width
from library.models.t5 import WORDS as T5_WORDS
from library.models.t5 import load_t5, t5_component
from library.models.vae.vae import VaeNeeds, load_vae, open_vae, vae_of_checkpoint
from library.options.model import BASE_FLAG

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
LATENT_SCALE = 1.5305
LATENT_SHIFT = 0.0609
DENOISER_PREFIX = DENOISER_PREFIXES[0]
ADVICE = (
    "SD3 requires a single file, such as the sd3_medium.safetensors or sd3.5_large.safetensors next to the "
    "diffusers folders of the same repository"
)
TEXT_PREFIXES = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}
ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


def open_loader(options: Sd3Options) -> tuple[DitLoader, MMDiTConfig]:
    """Open the files that the options name; only headers are read. Return the loader and the transformer's
    configuration.

    The loader's text encoders are CLIP-L, CLIP-G and, if there is one, T5. Raises UserError naming the flag if a file
    is missing, broken, incomplete or another kind of model.
    """
    path, base = open_checkpoint(options.model.pretrained_model_name_or_path)
    check_variant(path, (), options.model.variant)
    mmdit = read_denoiser(base)
    config = configure(mmdit, read_config)
    name, needs = options.model.vae, VaeNeeds("SD3", LATENT_CHANNELS, LATENT_SCALE)
    texts: list[tuple[Callable[[], Component], LoadPart]] = [
        (partial(open_clip, clip, options.text, base), load_clip) for clip in ("clip_l", "clip_g")
    ]
    if has_t5(options, base):
        texts.append((partial(open_t5, options.text, base), load_t5))
    loader = open_dit_loader(
        options,
        BaseFiles(path, base),
        mmdit,
        partial(MMDiT, config),
        texts=texts,
        text_dtype=DTYPES[options.precision.mixed_precision],
        vae=lambda: vae_of_checkpoint(BASE_FLAG, base) if name is None else open_vae(name, needs),
        load_vae=load_vae,
    )
    components = [part.component for part in loader.texts]
    check_widths(config, components[:2], components[2:])
    return loader, config


def open_checkpoint(name: str | None) -> tuple[Path, Weights]:
    """Open the single file with the denoiser. Raises UserError if it is something else, naming it."""
    path = existing(BASE_FLAG, require_base_name(name, "the .safetensors file of an SD3 or SD3.5 model"))
    specs = list_specs()
    weights = open_single_file(specs, BASE_FLAG, path, "sd3", ADVICE)
    spec = base_of_file(specs, weights.shapes)
    refuse_other(specs, BASE_FLAG, str(path), spec, "sd3", "checkpoint")
    if spec is None:
        why = "it has no joint_blocks, so it is not an SD3 checkpoint"
        raise about(BASE_FLAG, path)(f": {why} (first names: {list_first_names(weights)})")
    return path, weights


def read_denoiser(weights: Weights) -> Weights:
    """Keep only the denoiser's tensors, without prefix; a file without prefix contains other models' tensors too."""
    weights = with_prefix(weights, find_prefix(weights.shapes, DENOISER_PREFIXES))
    parts = ("joint_blocks.", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "final_layer.")
    names = [name for name in weights.shapes if name.startswith(parts) or name == "pos_embed"]
    return select_weights(weights, {name: name for name in names})


def open_clip(name: str, options: Sd3TextOptions, base: Weights) -> Component:
    """Open CLIP-L or CLIP-G from its own file or folder or from the base. Raises NotThere if neither has it."""
    weights = text_weights(name, options, base)
    if weights is None:
        why = f"{BASE_FLAG} {base.origin} has no text encoder {name} (nothing begins with {TEXT_PREFIXES[name]!r})"
        raise NotThere(f"{why}", f"use --{name}", setting=f"--{name}", others=[BASE_FLAG], path=base.origin)
    if name == "clip_l":
        weights = with_projection(weights)
    return clip_component(weights, ACTIVATIONS[name], projects=True)


def has_t5(options: Sd3Options, base: Weights) -> bool:
    """Return True if `t5xxl` or the base has T5, and warn if neither has it: SD3 works without T5."""
    if options.text.t5xxl is not None or any(key.startswith(TEXT_PREFIXES["t5xxl"]) for key in base.shapes):
        return True
    is_cached = options.text_caching.cache_text_encoder_outputs_to_disk
    logger.warning(
        "no T5: %s has none and --t5xxl is not set; its features are zeros, and captions are cut at CLIP's 75 tokens%s",
        base.origin,
        ". If captions were cached with T5, set --t5xxl; its file need not exist" if is_cached else "",
    )
    return False


def open_t5(options: Sd3TextOptions, base: Weights) -> Component:
    """Open T5 from its own file or folder or from the base."""
    weights = text_weights("t5xxl", options, base)
    assert weights is not None
    return t5_component(weights)


def text_weights(name: str, options: Sd3TextOptions, base: Weights) -> Weights | None:
    """Return a text encoder's weights without prefix, from its option's file or folder, else from the base; None
    without it."""
    file_name: str | None = getattr(options, name)
    prefix = TEXT_PREFIXES[name]
    if file_name is None:
        weights = with_prefix(base, prefix)
        return weights if weights.shapes else None
    flag = f"--{name}"
    path = existing(flag, file_name)
    # The option may also name a checkpoint with several models.
    weights = (
        model_lookup.open_part(flag, path, "text_encoder")[1] if path.is_dir() else model_lookup.open_file(flag, path)
    )
    return with_prefix(weights, prefix) if any(key.startswith(prefix) for key in weights.shapes) else weights


def with_projection(weights: Weights) -> Weights:
    """Add an identity projection to CLIP-L if its file has none, as implied by OpenAI's weights without one."""
    embedding = next((shape for key, shape in weights.shapes.items() if key.endswith("token_embedding.weight")), None)
    if embedding is None or any(key.startswith("text_projection") for key in weights.shapes):
        return weights
    width = embedding[1]
    return replace(
        weights,
        shapes={**weights.shapes, PROJECTION: (width, width)},
        read=lambda name: torch.eye(width) if name == PROJECTION else weights.read(name),
    )


def check_widths(config: MMDiTConfig, clips: Sequence[MaybeComponent], t5: Sequence[MaybeComponent]) -> None:
    """Raise UserError if the present text encoders do not fit the denoiser."""
    # Files of CLIP-L and CLIP-G given for one another have the right sum of widths, so their order is checked too.
    pooled = [clip.weights.shapes[PROJECTION][0] for clip in clips if isinstance(clip, Component)]
    if len(pooled) == len(clips) == 2 and (sum(pooled) != config.pooled_width or pooled[0] > pooled[1]):
        raise about("--clip_l", cause="does not fit", others=["--clip_g"])(
            f"and --clip_g have {pooled[0]} and {pooled[1]} pooled features ({clips[0].weights.origin}, "
            f"{clips[1].weights.origin}), but the model expects {config.pooled_width} together, fewer from CLIP-L",
            "check that they are not swapped or of another model",
        )
    for component in t5:
        check_text_width("--t5xxl", component, T5_WORDS[0], config.context_width, "T5-XXL v1.1")
