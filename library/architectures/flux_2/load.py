"""The files of FLUX.2: three files, one file with everything, or a diffusers folder."""

from library.architectures.flux_2.layers import DIFFUSERS_MARK, KEYS, MARK
from library.architectures.flux_2.model import Flux2, read_config
from library.architectures.flux_2.options import Flux2Options
from library.architectures.flux_2.releases import (
    Release,
    TextEncoder,
    modelspec_architecture,
    recognise_encoder,
    recognise_release,
    release_named,
)
from library.architectures.specs import list_specs
from library.checkpoints import model_lookup
from library.checkpoints.base_files import open_without_base
from library.checkpoints.weights import Weights, configure
from library.models.dit_loader import DitLoader
from library.models.language_model_dit import DitFiles, open_dit, open_parts, open_with, part_of
from library.models.language_models import FLAG
from library.models.qwen3 import FOLDER
from library.models.transformer_file import TransformerFile
from library.models.vae.flux_2 import PACKED_VAE


def architecture_of(weights: Weights) -> str:
    return modelspec_architecture(recognise_release(configure(weights, read_config), None, weights.origin))


TRANSFORMER = TransformerFile(
    base="flux_2",
    title="FLUX.2",
    architecture=architecture_of,
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    **KEYS.of_file,
    build=Flux2,
    read_config=read_config,
)


def files_with(encoder: TextEncoder) -> DitFiles:
    """Return the files of a release with this text encoder."""
    return DitFiles(TRANSFORMER, encoder.model, vae=PACKED_VAE, list_specs=list_specs, num_states=len(encoder.layers))


def open_loader(options: Flux2Options) -> tuple[DitLoader, Release]:
    """Open the files that the options name; only headers are read. Return the loader and the release of FLUX.2.

    Raises UserError naming the flag if a file is missing, broken, incomplete or of another model.
    """
    base = open_dit(TRANSFORMER, options)
    weights = TRANSFORMER.read(list_specs(), base)
    release = recognise_release(configure(weights, read_config), options.parts.model_version, str(base.path))
    return open_with(files_with(release.encoder), options, base, weights), release


def open_encoder(options: Flux2Options, flag: str) -> tuple[DitLoader, TextEncoder]:
    """Open the models for a caching command: the whole base model if it is given, else only the encoder of `flag`.

    Return the loader and the text encoder. Raises UserError like `open_loader`, or if neither is given.
    """
    if options.model.pretrained_model_name_or_path:
        loader, release = open_loader(options)
        return loader, release.encoder
    base, nothing = open_without_base(flag, part_of(options, flag))
    version = options.parts.model_version
    # For latents only the VAE is opened, so any text encoder will do.
    encoder = release_named(version or "dev").encoder
    if flag == FLAG:
        encoder = recognise_encoder(model_lookup.open_model(FLAG, str(base.path), FOLDER)[1], version)
    return open_parts(files_with(encoder), options, base, nothing), encoder
