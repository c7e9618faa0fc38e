"""Loading of FLUX.3 Image Klein's checkpoints: three files, one file with everything, or a diffusers folder."""

from collections.abc import Callable
from functools import partial

from torch import nn

from library.architectures.flux_3.layer_names import DIFFUSERS_MARK, IMAGES, KEYS, MARK
from library.architectures.flux_3.model import Flux3, read_config
from library.architectures.flux_3.options import Flux3Options
from library.architectures.flux_3.text import LAYERS
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure, select_weights
from library.models import dit_loader
from library.models.dit_loader import DitLoader, check_input_width, open_dit, open_dit_loader
from library.models.identify import open_denoiser
from library.models.language_models import WORDS, choose_load, with_first_layers
from library.models.loading import Component, check_text_width
from library.models.qwen3 import FOLDER, Qwen3Release
from library.models.qwen3_vl import load_qwen3_vl, qwen3_vl_component
from library.models.vae.flux_2 import PACKED_CHANNELS, load_flux_2_vae, open_vae

MODEL = "FLUX.3 Image Klein"
QWEN3_VL = Qwen3Release("--text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "text_encoders.qwen3vl_4b.transformer.model.")
HEADS_OF_TRAINING = "repa_projectors."  # in some checkpoints; they are of no use outside of the model's own training


def open_loader(options: Flux3Options) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(options.model, options.parts.text_encoder, MODEL)
    weights = read_denoiser(base, options.parts.edit)
    config = configure(weights, read_config)
    if options.parts.edit and not config.has_references:
        raise about("--edit", cause="needs")(
            f"needs layers for reference images, which {base.path} lacks; use a complete checkpoint of {MODEL}, "
            "or remove --edit"
        )
    loader = build_loader(options, base, weights, partial(Flux3, config))
    check_input_width(base.path, config.in_features, PACKED_CHANNELS, "token", MODEL)
    check_text_width(QWEN3_VL.flag, loader.text.component, WORDS, config.text_width // len(LAYERS), QWEN3_VL.hub_name)
    return loader


def build_loader(
    options: Flux3Options, base: BaseFiles, weights: Weights, build: Callable[[], nn.Module] | None = None
) -> DitLoader:
    load_text = choose_load(load_qwen3_vl, "Qwen3-VL", options.parts.fp8_text_encoder)
    return open_dit_loader(
        options,
        base,
        weights,
        build,
        texts=[(lambda: open_text_encoder(base, options.parts.text_encoder), load_text)],
        vae=lambda: open_vae(MODEL, options.model.vae, base),
        load_vae=load_flux_2_vae,
    )


open_encoder = partial(dit_loader.open_encoder, open_loader, build_loader)


def read_denoiser(base: BaseFiles, with_references: bool) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = open_denoiser(list_specs(), base, "flux_3", MARK, DIFFUSERS_MARK, KEYS.from_diffusers)
    left_out = (HEADS_OF_TRAINING,) if with_references else (HEADS_OF_TRAINING, f".{IMAGES[1]}.")
    return select_weights(weights, {key: key for key in weights.shapes if not any(part in key for part in left_out)})


def open_text_encoder(base: BaseFiles, name: str | None) -> Component:
    """Open the text encoder's component, without its unused layers."""
    config, weights = base.open_text_encoder(QWEN3_VL.flag, name, FOLDER, QWEN3_VL.prefix)
    return with_first_layers(qwen3_vl_component(weights, config, QWEN3_VL), LAYERS[-1], QWEN3_VL.flag)
