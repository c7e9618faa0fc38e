"""Loading of Krea 2 checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from library.architectures.krea2.checkpoint_keys import DIFFUSERS_MARK, MARK, from_diffusers
from library.architectures.krea2.model import PATCH, SingleStreamDiT, read_config
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.text import LAYERS
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.base_files import BaseFiles, open_files
from library.checkpoints.model_lookup import find_model
from library.checkpoints.recognition import is_dora
from library.checkpoints.weights import Weights, configure
from library.models import dit_loader
from library.models.distilled import DistilledRelease
from library.models.dit_loader import DitLoader, add_vision, check_input_width, open_dit, open_dit_loader
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load, with_first_layers
from library.models.loading import Component, check_text_width
from library.models.qwen3 import FOLDER, Qwen3Release
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component
from library.models.qwen3_vl_vision import load_vision, vision_component
from library.models.vae.qwen_image import CHANNELS, open_vae
from library.models.vae.qwen_image_2d import load_vae_for_images
from library.options.model import BASE_FLAG

MODEL = "Krea 2"
TURBO_FLAG = "--turbo_dit"
TURBO = DistilledRelease("--dit_variant", base_words=frozenset(("raw",)))
QWEN3_VL = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "text_encoders.qwen3vl_4b.transformer.model.")


def open_loader(options: Krea2Options) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    loader = build_loader(options, base, weights, partial(SingleStreamDiT, config))
    check_input_width(base.path, config.in_features, CHANNELS * PATCH**2, "patch", MODEL)
    if config.num_states != len(LAYERS):
        raise about(BASE_FLAG, base.path)(
            f": the transformer takes {config.num_states} states of the text encoder for each "
            f"token, but only {len(LAYERS)} are supported; use a checkpoint of {MODEL}"
        )
    check_text_width(QWEN3_VL.flag, loader.text.component, WORDS, config.fusion.width, QWEN3_VL.hub_name)
    return loader


def build_loader(
    options: Krea2Options, base: BaseFiles, weights: Weights, build: Callable[[], nn.Module] | None = None
) -> DitLoader:
    # The language and the vision model are in the same files, whose headers are read once.
    qwen3_vl = cache(lambda: base.open_text_encoder(QWEN3_VL.flag, options.parts.text_encoder, FOLDER, QWEN3_VL.prefix))
    load_text = choose_load(load_qwen3_vl, "Qwen3-VL", options.parts.fp8_text_encoder)
    loader = open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[(lambda: language_component(*qwen3_vl()), load_text)],
        vae=lambda: open_vae(MODEL, options.model.vae, base),
        load_vae=load_vae_for_images,
    )
    return add_vision(loader, lambda: vision_component(qwen3_vl()[1]), load_vision)


open_encoder = partial(dit_loader.open_encoder, open_loader, build_loader)


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    return open_denoiser(list_specs(), base, "krea2", MARK, DIFFUSERS_MARK, from_diffusers)


def open_turbo(options: Krea2Options, loader: DitLoader) -> DitLoader | None:
    """Return the loader with the denoiser of --turbo_dit in place of its own; None if the option is not set.

    Raises UserError if it does not fit the base model or this adapter.
    """
    name, base = options.parts.turbo_dit, loader.denoiser_weights
    if name is None:
        return None
    weights = read_denoiser(open_files(TURBO_FLAG, find_model(TURBO_FLAG, name, (("transformer",),))))
    if configure(weights, read_config) != configure(base, read_config):
        raise about(TURBO_FLAG, cause="does not fit")(
            f"{name} and the base {base.origin} have different sizes; use two of one size"
        )
    # Weights are exchanged tensor by tensor in place, which needs two files of one form.
    if {k: q.kind for k, q in weights.quantised.items()} != {k: q.kind for k, q in base.quantised.items()}:
        raise about(TURBO_FLAG)(
            f"{name} is stored differently from the base {base.origin}: one has 8-bit weights where the "
            "other has none; use two files of the same precision"
        )
    if any(argument.startswith("dora_wd") for argument in options.network.network_args or ()):
        raise about(TURBO_FLAG, cause="does not fit")(
            "does not work with dora_wd, which keeps the norms of the base's weights; remove one of them"
        )
    file = options.network.network_weights
    if options.network.dim_from_weights and file is not None and is_dora(Path(file)):
        raise about(TURBO_FLAG, cause="does not fit")(
            f"does not work with a DoRA, which keeps the norms of the base's weights, and "
            f"--network_weights {file} is one; remove {TURBO_FLAG}"
        )
    return replace(loader, denoiser_weights=weights)


def language_component(config: Mapping[str, Any] | None, weights: Weights) -> Component:
    """Build the language model's component, without its unused layers."""
    return with_first_layers(qwen3_vl_component(weights, config, QWEN3_VL), LAYERS[-1], QWEN3_VL.flag)
