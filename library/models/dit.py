"""Opening of base models whose transformer, text encoder and VAE are separate files, by musubi-tuner's options."""

import torch

from library.checkpoints.base_files import BaseFiles, open_base, without_base
from library.checkpoints.weights import Weights
from library.memory.devices import DTYPES
from library.options.dit import DitTrainOptions


def open_dit(options: DitTrainOptions, title: str) -> BaseFiles:
    """Open the transformer's file, or the folder with every part that has no file of its own. Raises UserError naming
    the flag if it is missing or broken."""
    given = {"text_encoder": options.parts.text_encoder, "vae": options.model.vae}
    return open_base(
        options.model.pretrained_model_name_or_path,
        f"the file of {title}'s transformer, or a diffusers folder",
        [folder for folder in ("transformer", "text_encoder", "vae") if given.get(folder) is None],
    )


def open_without_dit(options: DitTrainOptions, flag: str) -> tuple[BaseFiles, Weights]:
    """Return the files, and the weights of no denoiser, of a caching command that is given only the encoder that `flag`
    names. Raises UserError if it is not given."""
    return without_base(flag, options.model.vae if flag == "--vae" else options.parts.text_encoder)


def text_dtype_of(options: DitTrainOptions) -> torch.dtype:
    """Return the dtype of the text encoder, whose states overflow float16."""
    dtype = DTYPES[options.precision.mixed_precision]
    return torch.bfloat16 if dtype == torch.float16 else dtype
