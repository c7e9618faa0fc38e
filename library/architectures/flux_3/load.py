"""The files of FLUX.3 Image Klein: three files, one file with everything, or a diffusers folder."""

from library.architectures.flux_3.layers import DIFFUSERS_MARK, IMAGES, KEYS, MARK
from library.architectures.flux_3.model import Flux3, read_config
from library.architectures.flux_3.options import Flux3Options
from library.architectures.flux_3.text import LAYERS
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.weights import configure, select_weights
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import DitFiles, open_dit, open_with
from library.models.qwen3_vl import qwen3_vl_encoder
from library.models.transformer_file import TransformerFile
from library.models.vae.flux_2 import PACKED_VAE

FILES = DitFiles(
    TransformerFile(
        base="flux_3",
        title="FLUX.3 Image Klein",
        architecture="Flux.3-image-klein",
        mark=MARK,
        diffusers_mark=DIFFUSERS_MARK,
        **KEYS.of_file,
        build=Flux3,
        read_config=read_config,
        unused=("repa_projectors.",),  # in some checkpoints, for the model's own training
    ),
    encoder=qwen3_vl_encoder("4B", LAYERS[-1]),
    vae=PACKED_VAE,
    list_specs=list_specs,
    encoder_width=lambda config: int(config.text_width) // len(LAYERS),
)


def open_loader(options: Flux3Options) -> DitLoader:
    """Open the files that the options name, without --edit also without the layers for reference images.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(FILES.transformer, options)
    weights = FILES.transformer.read(list_specs(), base)
    if not options.parts.edit:
        left_out = f".{IMAGES[1]}."
        weights = select_weights(weights, {key: key for key in weights.shapes if left_out not in key})
    elif not configure(weights, read_config).has_references:
        raise about("--edit", cause="needs")(
            f"needs layers for reference images, which {base.path} lacks",
            f"use a complete checkpoint of {FILES.transformer.title}, or remove --edit",
        )
    return open_with(FILES, options, base, weights)
