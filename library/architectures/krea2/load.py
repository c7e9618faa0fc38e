"""The files of Krea 2: three files, one file with everything, or a diffusers folder."""

from dataclasses import replace
from pathlib import Path

from library.architectures.krea2.layers import DIFFUSERS_MARK, KEYS, MARK, from_diffusers
from library.architectures.krea2.model import PATCH, SingleStreamDiT, read_config
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.text import LAYERS, MARKS
from library.architectures.specs import list_specs
from library.base.errors import about
from library.checkpoints.base_files import open_files
from library.checkpoints.model_lookup import find_model
from library.checkpoints.recognition import is_dora
from library.checkpoints.weights import configure
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import DitFiles, open_models
from library.models.qwen3_vl import qwen3_vl_encoder
from library.models.qwen3_vl_vision import load_vision, vision_component
from library.models.transformer_file import TransformerFile
from library.models.vae.qwen_image import CHANNELS, open_vae
from library.models.vae.qwen_image_2d import load_vae_for_images
from library.models.vae.vae import TransformerVae
from library.options.model import BASE_FLAG

TURBO_FLAG = "--turbo_dit"
FILES = DitFiles(
    TransformerFile(
        base="krea2",
        title="Krea 2",
        architecture="Krea-2",
        mark=MARK,
        diffusers_mark=DIFFUSERS_MARK,
        is_layer=KEYS.is_linear,
        name=KEYS.name,
        build=SingleStreamDiT,
        read_config=read_config,
        from_diffusers=from_diffusers,
    ),
    encoder=replace(qwen3_vl_encoder("4B", LAYERS[-1]), marks=MARKS, vision=(vision_component, load_vision)),
    vae=TransformerVae(open_vae, load_vae_for_images, CHANNELS * PATCH**2, "patch"),
    list_specs=list_specs,
    encoder_width=lambda config: int(config.fusion.width),
)


def open_loader(options: Krea2Options) -> DitLoader:
    """Open the files that the options name, as `open_models` does.

    Raises UserError for a transformer that takes another number of the encoder's states, too.
    """
    loader = open_models(FILES, options)
    num_states = configure(loader.denoiser_weights, read_config).num_states
    if num_states != len(LAYERS):
        raise about(BASE_FLAG, loader.path)(
            f": the transformer takes {num_states} states of the text encoder for each token, but only {len(LAYERS)} "
            "are supported",
            "use a checkpoint of Krea 2",
        )
    return loader


def open_turbo(options: Krea2Options, loader: DitLoader) -> DitLoader | None:
    """Return the loader with the denoiser of --turbo_dit in place of its own; None if the option is not set.

    Raises UserError if it does not fit the base model or this adapter.
    """
    name, base = options.parts.turbo_dit, loader.denoiser_weights
    if name is None:
        return None
    weights = FILES.transformer.read(
        list_specs(), open_files(TURBO_FLAG, find_model(TURBO_FLAG, name, (("transformer",),)))
    )
    if configure(weights, read_config) != configure(base, read_config):
        raise about(TURBO_FLAG, cause="does not fit")(
            f"{name} and the base {base.origin} have different sizes", "use two of one size"
        )
    # Weights are exchanged tensor by tensor in place, which needs two files of one form.
    if {k: q.kind for k, q in weights.quantised.items()} != {k: q.kind for k, q in base.quantised.items()}:
        raise about(TURBO_FLAG)(
            f"{name} is stored differently from the base {base.origin}: one has 8-bit weights where the other has none",
            "use two files of the same precision",
        )
    if any(argument.startswith("dora_wd") for argument in options.network.network_args or ()):
        raise about(TURBO_FLAG, cause="does not fit")(
            "does not work with dora_wd, which keeps the norms of the base's weights", "remove one of them"
        )
    file = options.network.network_weights
    if options.network.dim_from_weights and file is not None and is_dora(Path(file)):
        raise about(TURBO_FLAG, cause="does not fit")(
            f"does not work with a DoRA, which keeps the norms of the base's weights, and --network_weights {file} is "
            "one",
            f"remove {TURBO_FLAG}",
        )
    return replace(loader, denoiser_weights=weights)
