"""The file that keeps a measured convention: where it lies, what it holds, and when it is believed."""

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from library.architectures.any_pipeline.convention import Convention, Line, Unconditional
from library.architectures.any_pipeline.trees import Output, map_leaves, map_tensors
from library.architectures.any_pipeline.trees import Path as TreePath
from library.architectures.any_pipeline.watch import key_of
from library.base.atomic_files import atomic_path
from library.checkpoints.files import load_pickle

logger = logging.getLogger(__name__)

FOLDER = "sd-scripts-pipelines"  # below HF_HOME, for runs without --cache_dir
NARROW = (torch.bfloat16, torch.float16)  # types in which text encoders compute


class NotBelieved(Exception):
    """The reason why a kept file is not used."""


def find_place(cache_dir: str | None, fingerprint: str) -> Path:
    """Return where the convention of a pipeline is kept."""
    if cache_dir:
        return Path(cache_dir).expanduser() / f"pipeline_{fingerprint}.pt"
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / FOLDER / f"pipeline_{fingerprint}.pt"


def write_convention(path: Path, convention: Convention, fingerprint: str) -> None:
    """Write a file that `read_convention` reads; log a line if its folder cannot be written."""
    narrowed = replace(convention, memory=map_tensors(dict(convention.memory), narrow))
    kept = {"fingerprint": fingerprint, "digest": digest(fingerprint, narrowed), "convention": narrowed}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(kept, temporary)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the pipeline is measured again at each start", path, error)


def read_convention(path: Path, fingerprint: str) -> Convention:
    """Read a kept convention. Raises NotBelieved for a file that is damaged or that another program wrote."""
    try:
        with safe_globals([Convention, Line, Unconditional, Output]):
            kept = load_pickle(path)
        if not isinstance(kept, dict):
            raise NotBelieved("it holds no measured pipeline")
        convention: Convention = kept["convention"]
        is_own = (kept["fingerprint"], kept["digest"]) == (fingerprint, digest(fingerprint, convention))
    except Exception as error:  # a damaged file raises anything
        raise NotBelieved(str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from error
    if not is_own:
        raise NotBelieved("its contents are not those that were written")
    memory = map_tensors(convention.memory, lambda old: old.float() if old.is_floating_point() else old)
    return replace(convention, memory=memory)


def digest(fingerprint: str, convention: Convention) -> str:
    return key_of(fingerprint, {field.name: getattr(convention, field.name) for field in fields(convention)})


def narrow(tensor: Tensor) -> Tensor:
    """Return a tensor in the narrowest type that holds exactly its values."""
    if tensor.is_floating_point():
        for dtype in NARROW:
            if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                return tensor.to(dtype)
    return tensor.clone()


def drop_unread(memory: Mapping[str, Any], read: set[tuple[str, TreePath]]) -> dict[str, Any]:
    """Return outputs of text encoders with empty tensors where nothing read them, such as logits."""

    def keep(key: str, path: TreePath, leaf: Any) -> Any:
        return leaf.new_empty(0) if isinstance(leaf, Tensor) and (key, path) not in read else leaf

    return {key: map_leaves(output, partial(keep, key)) for key, output in memory.items()}
