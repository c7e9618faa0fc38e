"""Locating a model's files: a single file, a diffusers folder, or a hub repository."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.base.errors import NotThere, about, flagged, of_file
from library.base.json_text import parse_json
from library.base.suggestions import nearby
from library.checkpoints.headers import WEIGHT_SUFFIXES
from library.checkpoints.quantised import open_checkpoint
from library.checkpoints.weights import Weights

logger = logging.getLogger(__name__)

HUB_NAME = r"[\w.-]+(/[\w.-]+(@[\w./-]+)?)?"  # with a branch, tag or commit behind the @
HUB_TIMEOUT_S = 5.0
TEXT_STEMS = ("model", "pytorch_model")  # for .safetensors and .bin files
WEIGHT_STEMS = {"text_encoder": TEXT_STEMS, "text_encoder_2": TEXT_STEMS, "text_encoder_3": TEXT_STEMS}  # by folder
PLAIN_STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")


def find_model(
    flag: str, name: str, parts: Sequence[Sequence[str]], bar: type[Any] | None = None, variant: str | None = None
) -> Path:
    """Return the local file or folder of `name`, downloading it if `name` is a hub repository.

    `parts` lists what is needed from a repository: for each part, the folders that may contain it ("" is the top).
    `variant` is in the names of the files that are wanted. `bar` is the hub client's class of progress bars, or one
    like it. Raises UserError saying what to do.
    """
    path = Path(name).expanduser()
    # A mistyped path must end in an error with the nearest file name, not in a request to the hub.
    is_local = path.is_absolute() or path.suffix.lower() in WEIGHT_SUFFIXES or not re.fullmatch(HUB_NAME, name)
    return existing(flag, name) if path.exists() or is_local else fetch_model(flag, name, parts, bar, variant)


def existing(flag: str, name: str) -> Path:
    """Return the path of an existing file or folder. Raises NotThere with the nearest name if it does not exist."""
    path = Path(name).expanduser()
    if not path.exists():
        raise about(flag, name, kind=NotThere)(f"does not exist{nearby(path)}")
    return path


def fetch_model(
    flag: str, name: str, parts: Sequence[Sequence[str]], bar: type[Any] | None = None, variant: str | None = None
) -> Path:
    """Download the needed files of a diffusers repository: configurations, and the weights in one format; of a part
    that has `variant`, only that.

    Raises NotThere if the repository can neither be downloaded nor found in the cache.
    """
    folders, lacking = [folder for part in parts for folder in part], list(parts)
    small_files = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]
    small_files += [in_repository(folder, "config.json") for folder in folders]
    snapshot = Path()
    for num_format in range(-1 if variant else 0, NUM_FORMATS):
        weights = [
            in_repository(folder, file)
            for part in lacking
            for folder in part
            for file in (weight_files(folder)[num_format] if num_format >= 0 else variant_files(folder, str(variant)))
        ]
        try:
            snapshot = fetch_snapshot(name, [*small_files, *weights], bar)
        except ConnectionError as error:
            raise about(flag, name, kind=NotThere)(
                f"is neither a file nor a folder, and cannot be downloaded from the hub ({error}). "
                "Check the path, or download the model elsewhere and use the path of its folder or file"
            ) from error
        if num_format < 0:  # plain files that are cached do not count
            lacking = [part for part in parts if not any(find_weight_file(snapshot / f, f, variant) for f in part)]
        if all(any(find_weight_file(snapshot / folder, folder) for folder in part) for part in lacking):
            break
    return snapshot


def in_repository(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def fetch_snapshot(name: str, patterns: Sequence[str], bar: type[Any] | None = None) -> Path:
    """Return the folder with those files of a hub repository that match `patterns`, downloaded or cached. A download
    that was cut goes on where it ended. `name` may have a revision: owner/model@revision.

    Raises ConnectionError with the reason if they are neither on the hub nor in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    hub_error, (repository, _, revision) = "", name.partition("@")
    place: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        HfApi().repo_info(
            repository, timeout=HUB_TIMEOUT_S, **place
        )  # without network, snapshot_download alone waits for minutes
    except Exception as error:  # each network library of the hub client has its own errors
        hub_error = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        logger.warning("cannot download %s from the hub (%s); trying the local cache", name, hub_error)
    try:
        folder = snapshot_download(
            repository, allow_patterns=list(patterns), local_files_only=bool(hub_error), tqdm_class=bar, **place
        )
        return Path(folder)
    except GatedRepoError as error:
        raise ConnectionError(
            f"the hub asks for a login: accept the terms of {repository} on its page, and run `hf auth login`"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: not a valid repository name
        raise ConnectionError(hub_error or str(error)) from error


def weight_files(kind: str) -> tuple[tuple[str, ...], ...]:
    """Return the possible weight file names of a part, one tuple per format; * matches the numbers of sharded files."""
    stem, pickled = WEIGHT_STEMS.get(kind, PLAIN_STEMS)
    return (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"),
        (f"{stem}.fp16.safetensors",),
        (f"{pickled}.bin", f"{pickled}.bin.index.json", f"{pickled}-*-of-*.bin"),
        (f"{pickled}.fp16.bin",),
    )


def variant_files(kind: str, variant: str) -> tuple[str, ...]:
    """Return the possible names of a part's weight files of a variant; * matches the numbers of sharded files."""
    endings = (f".{variant}.safetensors", f".safetensors.index.{variant}.json", f".{variant}-*-of-*.safetensors")
    stem, pickled = WEIGHT_STEMS.get(kind, PLAIN_STEMS)
    return (
        *(f"{stem}{ending}" for ending in endings),
        f"{stem}-*-of-*.{variant}.safetensors",
        f"{pickled}.{variant}.bin",
    )


NUM_FORMATS = len(weight_files("unet"))


def find_weight_file(folder: Path, kind: str, variant: str | None = None) -> Path | None:
    """Return the weight file of one part of a diffusers folder, or None.

    With `variant`, such as "fp16", the name must contain it.
    """
    formats = weight_files(kind) if variant is None else (variant_files(kind, variant),)
    names = [name for names in formats for name in names if "*" not in name]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_model(flag: str, name: str, kind: str) -> tuple[dict[str, Any] | None, Weights]:
    """Open the configuration and weights of one model.

    `name` is a file (its configuration is None), the model's own folder, or a diffusers folder that has the model in
    `kind`/. Raises UserError naming `flag` and what is missing.
    """
    path = find_model(flag, name, (("", kind),))
    if not path.is_dir():
        return None, open_file(flag, path)
    return open_part(flag, path if (path / "config.json").is_file() else path / kind, kind)


def open_part(flag: str, folder: Path, kind: str, variant: str | None = None) -> tuple[dict[str, Any], Weights]:
    """Open the configuration and weights of the part `kind` of a diffusers folder: "unet", "vae", "text_encoder", ...

    `folder` is the part's folder. Without files of `variant` its plain ones are opened, with a warning. Raises NotThere
    naming what is missing.
    """
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.parent.glob("*") if file.suffix.lower() in WEIGHT_SUFFIXES)
        hint = f"; to use {files[0]} in it, give its path" if files else ""
        raise about(flag, folder.parent, kind=NotThere)(
            f"is not a diffusers folder: {folder / 'config.json'} is missing{hint}"
        )
    file = find_weight_file(folder, kind, variant)
    if file is None and variant is not None:
        file = find_weight_file(folder, kind)
        logger.warning("--variant %s: %s has no such weights; taking %s", variant, folder, file)
    if file is None:
        expected = weight_files(kind)[0][0]
        raise NotThere(f"{flag}: {folder} has no weights; expected {expected} in it", setting=flag, path=folder)
    logger.info("%s: %s", kind, file)
    return read_model_config(folder), open_file(flag, file)


def open_file(flag: str, path: Path) -> Weights:
    """Open a weight file. Raises UserError naming `flag`."""
    try:
        with flagged(flag, path):
            return open_checkpoint(path)
    except PermissionError as error:
        raise about(flag, path, cause="unreadable")(
            f"cannot be read: {error.strerror}", "change its permissions"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return {} if the file does not exist. Raises UserError if it is damaged."""
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise of_file(path, cause="unreadable")(f"is damaged: {error}") from None
    if not isinstance(content, dict):
        raise of_file(path, cause="unreadable")(f"is damaged: it contains a {type(content).__name__}, not an object")
    return content


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model. Raises UserError if it is damaged, or asks for code from the hub."""
    config = read_json(folder / "config.json")
    refuse_kernels(folder / "config.json", config)
    return config


def refuse_kernels(file: Path, value: object) -> None:
    """Raise UserError for an attention that transformers would download from the hub ("owner/name") and run."""
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        refuse_kernels(file, part)
    for key, name in value.items() if isinstance(value, dict) else ():
        if str(key).endswith("_implementation") and "/" in str(name):
            reason = f"asks for {key} {name}, code that transformers would download and run; remove that line"
            raise of_file(file, place=str(key))(reason)


def read_pipeline_class(folder: Path) -> str:
    """Return the class that a folder's model_index.json names; "" without one. Raises UserError for anything else than
    the name of a class, such as a list that names a Python file of the folder."""
    index = read_json(folder / "model_index.json")
    name: Any = index.get("_class_name", "")
    if isinstance(name, str) and (name == "" or name.isidentifier()):
        return name
    raise of_file(folder / "model_index.json", place="_class_name")(
        f": _class_name is {str(name)[:80]!r}, not the name of a pipeline of diffusers. If it names Python code of the "
        "model itself, only diffusers_train_network.py can run that"
    )
