"""Opening of base models whose transformer, text encoder and VAE are separate files, by musubi-tuner's options."""

from pathlib import Path

from library.checkpoints.base_files import BaseFiles, open_base, without_base
from library.checkpoints.model_lookup import read_json
from library.checkpoints.weights import Weights
from library.options.model import ModelOptions


def open_dit(model: ModelOptions, text_encoder: str | None, title: str) -> BaseFiles:
    """Open the transformer's file, or the folder with every part that has no file of its own. Raises UserError naming
    the flag if it is missing or broken."""
    given = {"text_encoder": text_encoder, "vae": model.vae}
    return open_base(
        model.pretrained_model_name_or_path,
        f"the file of {title}'s transformer, or a diffusers folder",
        [folder for folder in ("transformer", "text_encoder", "vae") if given.get(folder) is None],
    )


def open_without_dit(model: ModelOptions, text_encoder: str | None, flag: str) -> tuple[BaseFiles, Weights]:
    """Return the files, and the weights of no denoiser, of a caching command that is given only the encoder that `flag`
    names. Raises UserError if it is not given."""
    return without_base(flag, model.vae if flag == "--vae" else text_encoder)


def recorded_as_distilled(path: Path) -> bool | None:
    """Return what a diffusers folder says of its denoiser; None for a file, or if it does not say."""
    recorded = read_json(path / "model_index.json").get("is_distilled") if path.is_dir() else None
    return None if recorded is None else bool(recorded)


def name_in_folder(given: str) -> str:
    """Return the name of a file or folder after that of the folder around it, in lower case."""
    path = Path(given).expanduser().absolute()
    return f"{path.parent.name}/{path.name}".lower()
