"""The files of a base model: a diffusers folder or a single file, with parts that flags may replace."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights
from library.errors import NotThere, UserError
from library.options.model import BASE_FLAG


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk; only headers of its files are read."""

    path: Path
    whole: Weights | None = None  # the tensors of a single file; None for a folder
    flag: str = BASE_FLAG  # for messages

    def open_folder(self, name: str) -> tuple[dict[str, Any], Weights]:
        """Open one part of a diffusers folder: its configuration and weights. Raises NotThere if it is missing."""
        return model_lookup.open_part(self.flag, self.path / name, name)

    def open_text_encoder(
        self, flag: str, name: str | None, folder: str, prefix: str
    ) -> tuple[dict[str, Any] | None, Weights]:
        """Open the text encoder that `name` names, or without a name the base model's: its folder, or the whole single
        file, in which its names begin with `prefix`. The configuration is None for a file.

        Raises NotThere if the base model has no such encoder.
        """
        if name is not None:
            return model_lookup.open_model(flag, name, folder)
        if self.whole is None:
            return self.open_folder(folder)
        if not any(key.startswith(prefix) for key in self.whole.shapes):
            raise NotThere(f"{flag} is missing: {self.path} does not contain this text encoder")
        return None, self.whole


def open_files(flag: str, path: Path) -> BaseFiles:
    """Open a base model on disk."""
    return BaseFiles(path, None if path.is_dir() else model_lookup.open_file(flag, path), flag)


def open_base(name: str | None, give: str, folders: Iterable[str] = ()) -> BaseFiles:
    """Open the base model that a run names, downloading these `folders` of a hub repository.

    Raises UserError saying what to `give` if there is no name.
    """
    return open_files(
        BASE_FLAG, model_lookup.find_model(BASE_FLAG, require_base_name(name, give), [(f,) for f in folders])
    )


def open_without_base(flag: str, name: str | None) -> tuple[BaseFiles, Weights]:
    """Return the files, and the weights of no denoiser, of a caching command that is given only the encoder that `flag`
    names; tokenizers are searched beside it. Raises UserError if there is no name."""
    if name is None:
        raise UserError(f"{flag} is missing: name its file or folder, or the whole model with --dit")
    path = Path(name).expanduser()
    nothing: dict[str, Tensor] = {}
    weights = Weights(str(path), {}, nothing.__getitem__)
    return BaseFiles(path, weights), weights


def require_base_name(name: str | None, give: str) -> str:
    """Return the name of the base model. Raises UserError saying what to `give` if there is none."""
    if not name:
        raise UserError(f"{BASE_FLAG} is missing: use {give}")
    return name
