"""The files of a base model besides its denoiser, found where ComfyUI, Forge and diffusers keep them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from library.architectures.scripts import script_of
from library.architectures.specs import list_specs
from library.base.errors import NotThere, UserError, error_in
from library.checkpoints.headers import is_safetensors, read_metadata
from library.checkpoints.recognition import recognise_adapter
from library.checkpoints.weights import open_weights
from library.models.distilled import split_words
from library.options.model import BASE_FLAG, TRAINING_ADAPTER, ModelFile
from library.options.train import TrainOptions
from library.train_photos.base import Base

# Folders below that of all models: text_encoders, clip and vae are ComfyUI's, text_encoder and VAE are Forge's;
# diffusers has text_encoder_2 and others beside the denoiser's folder.
PARTS = ("text_encoders", "clip", "text_encoder", "text_encoder_2", "text_encoder_3", "vae", "VAE")
ADAPTERS = ("loras", "Lora")
ADAPTER_WORDS = (frozenset(("training", "adapter")), frozenset(("training", "assistant")))  # in their published names
RELEASE_OPTIONS = ("model_version", "dit_variant")  # that say which release a base is, whatever its name
MOST_PARENTS = 3  # above the base, for a denoiser in models/diffusion_models/mine
NOT_IN_CACHE = ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")  # excuse parts that are not there

Build = Callable[[Mapping[str, Any]], None]
"""Assembles the base model with more options, to see which error that raises."""


def find_parts(base: Base, options: TrainOptions, models: Path | None) -> dict[str, Any]:
    """Return the options of the parts that the base's own files lack.

    Raises UserError for a part that is in none of the folders, with where it is to be had.
    """
    known = type(options).defaults()
    found: dict[str, Any] = {}
    uncached = {name: False for name in NOT_IN_CACHE if name in known}

    def build(more: Mapping[str, Any]) -> None:
        base.spec.build(options.with_values({**uncached, **found, **more}))

    while (missing := find_missing(build)) is not None:
        flag, error = missing
        path = find_part(base, build, flag, models) if flag in known and flag not in found else None
        if path is None:
            where = ", ".join(map(str, list_roots(base.path, models)))
            known_files = "; ".join(str(file) for file in list_files(base) if file.flag == flag)
            raise error_in(error.setting, cause="missing")(
                f"{error}. It is not in {where} either: name its folder with --models"
                + (f", or get it on the hub: {known_files}" if known_files else "")
            )
        found[flag] = str(path)
    for file in list_files(base):
        has_own = any(f".{file.flag}." in name for name in base.tensors)
        if file.is_optional and not has_own and (path := find_part(base, build, file.flag, models)) is not None:
            found[file.flag] = str(path)
    return found


def list_files(base: Base) -> tuple[ModelFile, ...]:
    """Return the published files of the base model and of its relatives."""
    return script_of(base.spec.build.__module__.split(".")[2]).files


def find_missing(build: Build) -> tuple[str, UserError] | None:
    """Return the option of the first part that is missing, with the error; None if all are there."""
    try:
        build({})
    except NotThere as error:
        if error.setting in (None, BASE_FLAG):
            raise
        return str(error.setting).removeprefix("--"), error
    return None


def find_part(base: Base, build: Build, flag: str, models: Path | None) -> Path | None:
    """Return the file or folder that the base model accepts as this part; those named like the released one first."""
    usual = " ".join(file.file for file in list_files(base) if file.flag == flag) or flag
    return next((path for path in rank_candidates(base.path, models, usual) if is_accepted(build, flag, path)), None)


def rank_candidates(base: Path, models: Path | None, usual: str, names: Sequence[str] = PARTS) -> list[Path]:
    """Return the candidates, those with a name like `usual` first."""
    likeness = {
        path: SequenceMatcher(None, path.name.lower(), usual.lower()).ratio()
        for path in list_candidates(base, models, names)
    }
    return sorted(likeness, key=lambda path: (-likeness[path], str(path)))


def is_accepted(build: Build, flag: str, path: Path) -> bool:
    """Return True if the base model takes the file as this part, whatever else is missing; only headers are read."""
    try:
        build({flag: str(path)})
    except UserError as error:
        return is_of_another(error, f"--{flag}", path)
    return True


def is_of_another(error: UserError, flag: str, path: Path) -> bool:
    """Return True if an error is surely about another option and another file."""
    if flag in (error.setting, *error.others) or (error.path is not None and Path(error.path).is_relative_to(path)):
        return False
    return error.setting is not None or error.path is not None


def list_roots(base: Path, models: Path | None) -> list[Path]:
    """Return the folders to search: those above the base that have folders of parts, its own, and `models`."""
    above = [folder for folder in list(base.parents)[:MOST_PARENTS] if any((folder / name).is_dir() for name in PARTS)]
    return list(dict.fromkeys([*([models] if models else []), base.parent, *above]))


def list_candidates(base: Path, models: Path | None, names: Sequence[str]) -> Iterator[Path]:
    """Yield the files and transformers or diffusers folders that may be a part, in folders of these names."""
    for root in list_roots(base, models):
        files = root.rglob("*") if root == models else root.glob("*")
        yield from (path for path in files if path.is_file() and is_safetensors(path) and path != base)
        for folder in (folder for name in names if (folder := root / name).is_dir()):
            if (folder / "config.json").is_file():
                yield folder
            yield from (path for path in folder.rglob("*") if path.is_file() and is_safetensors(path))


# --- the training adapter of a distilled base ---


def find_training_adapter(
    base: Base, given: Mapping[str, Any], models: Path | None
) -> tuple[ModelFile | None, Path | None]:
    """Return the published training adapter of a step-distilled base, and its file if it is there; None for other
    bases, and if the user's options say what acts beside the base."""
    if given.get(TRAINING_ADAPTER) or given.get("base_weights"):
        return None, None
    # A base distilled for guidance alone has no entry: nothing acts beside it unasked.
    published = next((file for file in list_files(base) if file.release and is_release(base, file, given)), None)
    if published is None:
        return None, None
    usual = published.file or published.repository
    found = rank_candidates(base.path, models, usual, ADAPTERS)
    return published, next((path for path in found if is_training_adapter(base, path)), None)


def is_release(base: Base, file: ModelFile, given: Mapping[str, Any]) -> bool:
    """Return True if a file is for this release: by the user's options, its tensors, or else its names."""
    stated = next((given[name] for name in RELEASE_OPTIONS if name in given), None)
    if stated is not None:
        return re.fullmatch(file.release, str(stated)) is not None
    if any(re.search(file.release, name) for name in base.tensors):
        return True
    return base.is_distilled and re.search(file.release, base.called.lower()) is not None


def is_training_adapter(base: Base, path: Path) -> bool:
    """Return True for an adapter of this base model that is named, or whose folder is, as training adapters are."""
    words = {*split_words(path.stem), *split_words(path.parent.name)}
    try:
        if not any(needed <= words for needed in ADAPTER_WORDS):
            return False
        return recognise_adapter(list_specs(), open_weights(path).shapes, read_metadata(path)) is base.spec
    except UserError:  # a damaged file is none
        return False
