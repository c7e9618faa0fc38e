"""The files of a base model: a diffusers folder or a single file, in which flags may replace parts."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.weights import Weights
from library.options.model import BASE_FLAG, ModelOptions


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk; opening it reads only file headers."""

    path: Path
    whole: Weights | None = None  # the tensors of a single file; None for a folder
    flag: str = BASE_FLAG  # for messages
    variant: str | None = None  # in the names of the weight files that are opened

    def open_folder(self, name: str) -> tuple[dict[str, Any], Weights]:
        """Open one part of a diffusers folder: its configuration and weights. Raises NotThere if it is missing."""
        return model_lookup.open_part(self.flag, self.path / name, name, self.variant)

    def open_text_encoder(
        self, flag: str, name: str | None, folder: str, prefix: str
    ) -> tuple[dict[str, Any] | None, Weights]:
        """Open the text encoder `name`, or the base model's own if `name` is None.

        The own one is in `folder` of a diffusers folder, or in the single file under `prefix`; for a single file, the
        configuration is None and the weights are those of the whole file.

        Raises NotThere if the base model has no such encoder.
        """
        if name is not None:
            return model_lookup.open_model(flag, name, folder)
        if self.whole is None:
            return self.open_folder(folder)
        if not any(key.startswith(prefix) for key in self.whole.shapes):
            raise about(flag, kind=NotThere)(f"is missing: {self.path} does not contain this text encoder")
        return None, self.whole


def open_files(flag: str, path: Path) -> BaseFiles:
    """Open a base model on disk. Raises UserError naming `flag` for a broken file."""
    return BaseFiles(path, None if path.is_dir() else model_lookup.open_file(flag, path), flag)


def open_base(model: ModelOptions, give: str, folders: Collection[str]) -> BaseFiles:
    """Open the base model of a run, downloading `folders` if it is a hub repository.

    Raises UserError if there is no name, of which `give` says which option to set, and if nothing is of the variant.
    """
    name = require_base_name(model.pretrained_model_name_or_path, give)
    path = model_lookup.find_model(BASE_FLAG, name, [(f,) for f in folders], variant=model.variant)
    check_variant(path, folders, model.variant)
    return replace(open_files(BASE_FLAG, path), variant=model.variant)


def check_variant(path: Path, folders: Iterable[str], variant: str | None) -> None:
    """Raise NotThere if no part of a base model has files of a variant."""
    if variant and not any(model_lookup.find_weight_file(path / folder, folder, variant) for folder in folders):
        raise about("--variant", variant, kind=NotThere)(f"is in the name of no weight file of {path}", "remove it")


def open_without_base(flag: str, name: str | None) -> tuple[BaseFiles, Weights]:
    """Return (files, empty denoiser weights) for a caching command that gets only one encoder, by `flag`.

    Tokenizers are looked for next to the encoder. Raises UserError if there is no name.
    """
    if name is None:
        raise about(flag, cause="missing")("is missing: name its file or folder, or the whole model with --dit")
    path = Path(name).expanduser()
    nothing: dict[str, Tensor] = {}
    weights = Weights(str(path), {}, nothing.__getitem__)
    return BaseFiles(path, weights), weights


def require_base_name(name: str | None, give: str) -> str:
    """Return the name of the base model. Raises UserError if there is none; `give` says which option to set."""
    if not name:
        raise about(BASE_FLAG, cause="missing")(f"is missing: use {give}")
    return name
