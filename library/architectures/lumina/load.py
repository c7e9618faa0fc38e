"""Loading of Lumina Image 2.0 checkpoints: three files, one file with everything, or a diffusers folder."""

from functools import partial

from library.architectures.lumina.gemma import GEMMA_PREFIXES, gemma_component, gemma_of_folder, load_gemma
from library.architectures.lumina.layers import DIFFUSERS_MARK, KEYS, MARK, gemma_module
from library.architectures.lumina.model import PATCH, NextDiT, read_config
from library.architectures.lumina.options import LuminaOptions
from library.architectures.specs import list_specs
from library.base.errors import flagged
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_files import BaseFiles, open_base
from library.checkpoints.weights import Weights, configure
from library.memory.devices import DTYPES
from library.models.adapter_views import view_both
from library.models.dit_loader import DitLoader, check_input_width, open_dit_loader
from library.models.identify import refuse_other_model
from library.models.language_models import LAYER_LINEAR, WORDS
from library.models.loading import Component, check_text_width
from library.models.transformer_file import TransformerFile
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import load_vae

MODEL = "Lumina Image 2.0"
GEMMA_FLAG = "--gemma2"
GEMMA_MARK = "text_encoders.gemma2_2b."


def name_text_layer(stem: str) -> ModuleNames | None:
    """Return the names of a layer of Gemma in a file with everything; None for other layers."""
    is_target = stem.startswith(GEMMA_PREFIXES[0]) and stem.endswith(LAYER_LINEAR)
    return gemma_module(stem.removeprefix(GEMMA_PREFIXES[0])) if is_target else None


TRANSFORMER = TransformerFile(
    base="lumina",
    title=MODEL,
    architecture="lumina-2",
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    **KEYS.of_file,
    build=NextDiT,
    read_config=read_config,
    unused=("norm_final.weight",),
    view=view_both,
    name_text_layer=name_text_layer,
)


def open_loader(options: LuminaOptions) -> DitLoader:
    """Open the files that the options name; only headers are read.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    gemma, ae = options.parts.gemma2, options.parts.ae
    paths = {"text_encoder": gemma, "vae": ae}
    base = open_base(
        options.model,
        "the file of Lumina's transformer, or a diffusers folder",
        [folder for folder in ("transformer", "text_encoder", "vae") if paths.get(folder) is None],
    )
    weights = read_denoiser(base)
    config = configure(weights, read_config)
    loader = open_dit_loader(
        options,
        base,
        weights,
        partial(NextDiT, config),
        texts=[(lambda: open_gemma(gemma, base), load_gemma)],
        text_dtype=DTYPES[options.precision.mixed_precision],
        vae=lambda: open_ae(MODEL, ae, base),
        load_vae=load_vae,
    )
    check_input_width(base.path, config.in_features, CHANNELS * PATCH**2, "patch", MODEL)
    check_text_width(GEMMA_FLAG, loader.text.component, WORDS, config.text_width, "Gemma 2 2B")
    return loader


def read_denoiser(base: BaseFiles) -> Weights:
    """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
    weights = TRANSFORMER.read(list_specs(), base)
    # Z-Image has layers of the same names.
    refuse_other_model(list_specs(), base.flag, str(base.path), (base.whole or weights).shapes, "lumina")
    return weights


def open_gemma(name: str | None, base: BaseFiles) -> Component:
    config, weights = base.open_text_encoder(GEMMA_FLAG, name, "text_encoder", GEMMA_MARK)
    # The readers' messages name only the file; if an option named it, the message begins with the option.
    with flagged("" if name is None else GEMMA_FLAG, separator=" "):
        return gemma_component(weights) if config is None else gemma_of_folder(config, weights)
