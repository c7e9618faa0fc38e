"""Loading of MOSS-Image checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable
from functools import cache, partial

from torch import nn

from library.architectures.moss_image.layer_names import FUSED, PARTS
from library.architectures.moss_image.model import MossImage, read_config
from library.architectures.moss_image.options import MossImageOptions
from library.architectures.moss_image.qwen3_5 import (
    FLAG,
    HUB_NAME,
    image_component,
    language_component,
    load_language,
    load_vision,
)
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.fused_tensors import split_rows
from library.checkpoints.weights import Weights, configure, select_weights
from library.models import dit_loader
from library.models.dit_loader import DitLoader, add_vision, check_input_width, open_dit, open_dit_loader
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load
from library.models.loading import check_text_width
from library.models.qwen3 import FOLDER
from library.models.vae.flux_2 import PACKED_CHANNELS, load_flux_2_vae, open_vae

MODEL = "MOSS-Image"
MARK = "shared_block_modulation.weight"
DERIVED = "rope.bands"  # in checkpoints; it is computed instead
TEXT_PREFIX = "text_encoders."  # in files with several models


def open_loader(options: MossImageOptions) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    loader = build_loader(options, base, weights, partial(MossImage, config))
    check_input_width(base.path, config.in_features, PACKED_CHANNELS, "token", MODEL)
    check_text_width(FLAG, loader.text.component, WORDS, config.text_width, HUB_NAME)
    return loader


def build_loader(
    options: MossImageOptions, base: BaseFiles, weights: Weights, build: Callable[[], nn.Module] | None = None
) -> DitLoader:
    # The language and the vision model are in the same files, whose headers are read once.
    qwen3_5 = cache(lambda: base.open_text_encoder(FLAG, options.parts.text_encoder, FOLDER, TEXT_PREFIX)[1])
    loader = open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[
            (
                lambda: language_component(qwen3_5()),
                choose_load(load_language, "Qwen3.5", options.parts.fp8_text_encoder),
            )
        ],
        vae=lambda: open_vae(MODEL, options.model.vae, base),
        load_vae=load_flux_2_vae,
    )
    return add_vision(loader, lambda: image_component(qwen3_5()), load_vision)


open_encoder = partial(dit_loader.open_encoder, open_loader, build_loader)


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = split_rows(open_denoiser(list_specs(), base, "moss_image", MARK), FUSED, PARTS)
    return select_weights(weights, {key: key for key in weights.shapes if key != DERIVED})
