"""The file that keeps a measured convention, with what the text encoders returned while it was measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.any_pipeline.convention import Convention, Line, Unconditional
from library.architectures.any_pipeline.folder import PipelineFolder
from library.architectures.any_pipeline.trees import Output
from library.checkpoints.files import load_state_dict, read_metadata, save_safetensors

VERSION = 1  # of this file and of the rules that measure


@dataclass(frozen=True)
class Kept:
    """A convention, and the outputs of text encoders by input."""

    convention: Convention
    memory: Mapping[str, Any]


def fingerprint(folder: PipelineFolder) -> str:
    """Return a digest of what a convention depends on: versions, classes, configurations, weight files."""
    import diffusers
    import transformers

    digest = blake2b(f"{VERSION} {diffusers.__version__} {transformers.__version__}".encode(), digest_size=10)
    for path in sorted(folder.path.rglob("*")):
        if path.suffix == ".json":
            digest.update(f"{path.relative_to(folder.path)}".encode() + path.read_bytes())
        elif path.suffix in (".safetensors", ".bin"):
            stat = path.stat()
            digest.update(f"{path.relative_to(folder.path)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def write_kept(path: Path, kept: Kept) -> None:
    tensors: dict[str, Tensor] = {}
    convention = {f.name: getattr(kept.convention, f.name) for f in fields(Convention)}
    convention["lines"] = [[where, vars(line)] for where, line in kept.convention.lines.items()]
    unconditional = kept.convention.unconditional
    convention["unconditional"] = None if unconditional is None else vars(unconditional)
    memory = {key: pack(value, tensors) for key, value in kept.memory.items()}
    text = json.dumps({"convention": pack(convention, tensors), "memory": memory})
    save_safetensors(path, tensors or {"none": torch.zeros(1)}, {"convention": text})


def read_kept(path: Path) -> Kept:
    content, tensors = json.loads(read_metadata(path)["convention"]), load_state_dict(path)
    values = unpack(content["convention"], tensors)
    values["lines"] = {where: Line(**line) for where, line in values["lines"]}
    values["unconditional"] = None if values["unconditional"] is None else Unconditional(**values["unconditional"])
    return Kept(Convention(**values), {key: unpack(value, tensors) for key, value in content["memory"].items()})


def pack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a tree as JSON, with its tensors in `tensors`."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().clone()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        kind = "output" if isinstance(tree, Output) else "dict"
        return {kind: [[pack(key, tensors), pack(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {type(tree).__name__: [pack(item, tensors) for item in tree]}
    return tree


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("output", "dict"):
        pairs = {unpack(key, tensors): unpack(item, tensors) for key, item in value}
        return Output(pairs) if kind == "output" else pairs
    items = [unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items
