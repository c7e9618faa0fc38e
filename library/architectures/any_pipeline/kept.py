"""The file that keeps a measured convention, with what the text encoders returned while it was measured."""

import ast
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor

from library.architectures.any_pipeline.convention import Convention, Line, Unconditional
from library.architectures.any_pipeline.folder import PipelineFolder
from library.architectures.any_pipeline.trees import Output, map_leaves
from library.checkpoints.files import load_state_dict, read_metadata, save_safetensors

VERSION = 4  # of this file and of the rules that measure
TENSOR = "tensor "


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
    """Write a file whose metadata are literals of Python that name its tensors."""
    tensors: dict[str, Tensor] = {}

    def name(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors[f"{TENSOR}{len(tensors)}"] = leaf.detach().clone()
        return next(reversed(tensors))

    content = map_leaves({"convention": asdict(kept.convention), "memory": dict(kept.memory)}, name)
    save_safetensors(path, tensors, {"content": repr(content)})


def read_kept(path: Path) -> Kept:
    content, tensors = ast.literal_eval(read_metadata(path)["content"]), load_state_dict(path)
    content = map_leaves(content, lambda _, leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf)
    values = content["convention"]
    values["lines"] = {where: Line(**line) for where, line in values["lines"].items()}
    values["unconditional"] = values["unconditional"] and Unconditional(**values["unconditional"])
    outputs = {key: Output(value) if isinstance(value, dict) else value for key, value in content["memory"].items()}
    return Kept(Convention(**values), outputs)
