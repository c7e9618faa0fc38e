"""A checkpoint to load a model from: names and shapes at hand, values read one by one when they are asked for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoints.files import is_safetensors, load_state_dict, read_header

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Weights:
    """The tensors of one or several files."""

    origin: str  # the path, for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]  # may share memory with the file: copy what is kept


def open_weights(path: Path) -> Weights:
    """Open a .safetensors, .ckpt, .pt, .pth or .bin file, or the `*.index.json` of a checkpoint in several files.

    Raises ValueError naming the file when it is truncated, something else, or a pickle that holds more than tensors.
    """
    if path.name.endswith(".index.json"):
        return open_sharded(path)
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise ValueError(f"{path} is no checkpoint: its name must end in one of {', '.join(WEIGHT_SUFFIXES)}")
    refuse_stranger(path)
    if is_safetensors(path):
        return open_safetensors(path)
    tensors = load_state_dict(path, mmap=True)
    return Weights(str(path), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def open_safetensors(path: Path) -> Weights:
    """Open one safetensors file; only its header is read before the first tensor is asked for."""
    from safetensors import safe_open

    shapes = {name: entry.shape for name, entry in read_header(path).tensors.items()}
    opened: list[Any] = []

    def read(name: str) -> Tensor:
        if not opened:
            opened.append(safe_open(str(path), framework="pt", device="cpu"))
        tensor: Tensor = opened[0].get_tensor(name)
        return tensor

    return Weights(str(path), shapes, read)


def open_sharded(index: Path) -> Weights:
    """Open the files that an `*.index.json` lists as one checkpoint."""
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    missing = sorted(name for name in set(weight_map.values()) if not (index.parent / name).is_file())
    if missing:
        raise ValueError(f"{index} lists files that are not beside it: {', '.join(missing)}; download them too")
    files = {name: open_weights(index.parent / name) for name in sorted(set(weight_map.values()))}
    shapes = {name: files[file].shapes[name] for name, file in weight_map.items()}
    return Weights(str(index), shapes, lambda name: files[weight_map[name]].read(name))


def refuse_stranger(path: Path) -> None:
    """Raise ValueError for the files that downloads leave in place of a checkpoint, saying what they are."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise ValueError(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page: the page about the download was saved instead of the download")
    if is_safetensors(path) and start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise ValueError(f"{path} is a PyTorch pickle under the name of a safetensors file; name it .ckpt")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        raise ValueError(f"{path} is a text file, not a checkpoint; it begins with {start[:40].decode('ascii')!r}")
