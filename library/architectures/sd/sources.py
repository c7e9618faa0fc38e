"""Find the files of a model: a single file, a diffusers folder, or a repository of the hub."""

import json
import logging
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from library.checkpoints.weights import WEIGHT_SUFFIXES, Weights, open_weights

logger = logging.getLogger(__name__)

HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
HUB_TIMEOUT_S = 5.0
WEIGHT_FILES = {  # in the order of preference; the first that is there is read
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
WEIGHT_PATTERNS = (("*model.safetensors", "*model-*.safetensors"), ("*model.fp16.safetensors",), ("*model.bin",))


def find_model(flag: str, name: str, hub_folders: Sequence[str]) -> Path:
    """The local file or folder of `name`, downloaded from the hub when it is the name of a repository there.

    `hub_folders` are the folders of the repository that are needed, "" for its top. Raises ValueError with the way out.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or path.suffix.lower() in WEIGHT_SUFFIXES or not re.fullmatch(HUB_NAME, name):
        raise ValueError(f"{flag} {name} does not exist{nearby(path)}")
    return fetch_model(flag, name, hub_folders)


def nearby(path: Path) -> str:
    """A hint for a path that does not exist: the nearest name in its folder, or the part of it that exists."""
    if path.parent.is_dir():
        near = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        return f"; did you mean {path.parent / near[0]}?" if near else ""
    existing = next((parent for parent in path.parents if parent.is_dir()), None)
    return f"; of that path only {existing} exists" if existing and existing != Path(".") else ""


def fetch_model(flag: str, name: str, folders: Sequence[str]) -> Path:
    """Download what is needed of a diffusers repository: its configuration, and one format of the weights."""
    stems = [f"{folder}/" if folder else "" for folder in folders]
    small = [f"{stem}{pattern}" for stem in (*stems, "tokenizer/", "scheduler/") for pattern in ("*.json", "*.txt")]
    snapshot = Path()
    for patterns in WEIGHT_PATTERNS:
        wanted = ["model_index.json", *small, *(f"{stem}{pattern}" for stem in stems for pattern in patterns)]
        snapshot = fetch_snapshot(flag, name, wanted)
        if all(find_weight_file(snapshot / folder, folder) for folder in folders):
            break
    return snapshot


def fetch_snapshot(flag: str, name: str, patterns: Sequence[str]) -> Path:
    """Files of a hub repository that match `patterns`, downloaded or from the cache.

    Raises ValueError when the hub cannot be reached and the cache does not have them.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), etag_timeout=HUB_TIMEOUT_S))
    except (OSError, ValueError) as error:  # what huggingface_hub raises for no network, no such name, no permission
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"{flag} {name} is neither a file nor a folder here, and the hub does not give it ({reason}). "
            "Check the path; or download the model elsewhere and give the path of its folder or file"
        ) from error


def find_weight_file(folder: Path, kind: str) -> Path | None:
    """The file that holds the weights of one part of a diffusers folder, None when there is none."""
    stem = WEIGHT_FILES.get(kind, "diffusion_pytorch_model")
    pickled = "pytorch_model" if stem == "model" else stem
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors"]
    names += [f"{pickled}.bin", f"{pickled}.bin.index.json", f"{pickled}.fp16.bin"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_part(flag: str, folder: Path, kind: str) -> tuple[dict[str, Any], Weights]:
    """Configuration and weights of the part `kind` of a diffusers folder: "unet", "vae" or "text_encoder".

    Raises ValueError naming what is missing.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{flag} {folder.parent} is no diffusers folder of SD 1.x: {folder / 'config.json'} is missing"
        )
    file = find_weight_file(folder, kind)
    if file is None:
        raise ValueError(f"{flag}: {folder} has no weights; expected {WEIGHT_FILES[kind]}.safetensors in it")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, open_weights(file)
