"""The file of a base model's transformer, for merging adapters into it and extracting them."""

from collections.abc import Callable
from pathlib import Path

from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.weights import Weights, find_prefix
from library.errors import UserError
from library.models.identify import DENOISER_PREFIXES


def open_transformer_file(
    flag: str, path: Path, title: str, mark: str | None, diffusers_mark: str | None
) -> tuple[Weights, str]:
    """Open a single file; return its weights, of which only the header is read, and the prefix of the transformer's.

    Raises UserError naming `flag` for a folder, an unreadable file, one in diffusers' layout, which has the weight
    `diffusers_mark`, and one without the weight `mark`; `title` is the base model's name in these messages.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; for {title} merging supports only a file in the original layout")
    weights = model_lookup.open_file(flag, path)
    prefix = find_prefix(weights.shapes, DENOISER_PREFIXES)
    if diffusers_mark is not None and prefix + diffusers_mark in weights.shapes:
        raise UserError(
            f"{flag} {path}: this is a transformer in diffusers' layout; use a file in the original layout, which "
            "other programs load"
        )
    if mark is not None and prefix + mark not in weights.shapes:
        raise UserError(f"{flag} {path} has no layers of {title}'s transformer")
    return weights, prefix


def names_below(
    prefix: str, is_layer: Callable[[str], bool], names: Callable[[str], ModuleNames]
) -> Callable[[str], ModuleNames | None]:
    """Return a function that gives the `names` of the layer of a weight, and None if adapters do not target it; its
    path is what follows the `prefix`."""

    def target_names(stem: str) -> ModuleNames | None:
        path = stem.removeprefix(prefix)
        return names(path) if stem.startswith(prefix) and is_layer(path) else None

    return target_names
