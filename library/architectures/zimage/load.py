"""Loading of Z-Image checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable
from functools import partial

from torch import nn

from library.architectures.specs import list_specs
from library.architectures.zimage.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.zimage.model import PATCH, ZImage, read_config
from library.architectures.zimage.options import ZImageOptions
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure, select_weights
from library.models import dit_loader
from library.models.distilled import DistilledRelease
from library.models.dit_loader import DitLoader, check_input_width, open_dit, open_dit_loader
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load
from library.models.loading import Component, check_text_width
from library.models.qwen3 import FOLDER, Qwen3Release, load_qwen3, qwen3_component
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae

MODEL = "Z-Image"
TURBO = DistilledRelease("--model_version")
QWEN3 = Qwen3Release("--text_encoder", "Qwen/Qwen3-4B", "text_encoders.qwen3_4b.transformer.model.")
MARK = "cap_pad_token"
UNUSED = "norm_final.weight"  # in checkpoints, but unused by the model


def open_loader(options: ZImageOptions) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    loader = build_loader(options, base, weights, partial(ZImage, config))
    check_input_width(base.path, config.in_features, CHANNELS * PATCH**2, "patch", MODEL)
    check_text_width(QWEN3.flag, loader.text.component, WORDS, config.text_width, QWEN3.hub_name)
    return loader


def build_loader(
    options: ZImageOptions, base: BaseFiles, weights: Weights, build: Callable[[], nn.Module] | None = None
) -> DitLoader:
    load_text = choose_load(load_qwen3, "Qwen3", options.parts.fp8_llm)
    return open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[(lambda: open_qwen3(options.parts.text_encoder, base), load_text)],
        vae=lambda: open_ae(MODEL, options.model.vae, base, "--vae"),
        load_vae=load_vae,
    )


open_encoder = partial(dit_loader.open_encoder, open_loader, build_loader)


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = open_denoiser(list_specs(), base, "zimage", MARK, DIFFUSERS_MARK, KEYS.from_diffusers)
    return select_weights(weights, {key: key for key in weights.shapes if key != UNUSED})


def open_qwen3(name: str | None, base: BaseFiles) -> Component:
    """Open Qwen3 from --text_encoder or from the base model."""
    _, weights = base.open_text_encoder(QWEN3.flag, name, FOLDER, QWEN3.prefix)
    return qwen3_component(weights, QWEN3)
