"""Writing of weight files, whole or not at all, with the command's mark."""

from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from library.base.atomic_files import atomic_path
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import is_safetensors
from library.checkpoints.marks import MARK_FIELD, add_digest, digest_tensors


def save_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, mark: str | None = None
) -> None:
    """Write a weight file, atomically; its extension chooses the format, of which only safetensors has metadata."""
    if is_safetensors(path):
        save_safetensors(path, tensors, metadata, mark)
    else:
        save_pickle_state_dict(path, tensors, mark=mark)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, mark: str | None = None
) -> None:
    """Write tensors, metadata and the command's mark to a safetensors file, atomically."""
    from safetensors.torch import save_file

    fields = {k: v for k, v in (metadata or {}).items() if k != MARK_FIELD}  # metadata may be those of another file
    fields |= {} if mark is None else {MARK_FIELD: add_digest(mark, digest_tensors(tensors))}
    with atomic_path(path) as temporary:
        # safetensors refuses views that are not contiguous.
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, fields or None)


def save_pickle_state_dict(
    path: str | Path, tensors: Mapping[str, Tensor], counts: Mapping[str, int] | None = None, mark: str | None = None
) -> None:
    """Write a .ckpt or .pt file for `torch.load(weights_only=True)`, atomically and without metadata.

    With `counts`, such as epochs, the tensors are stored in a dictionary `state_dict` next to them, as training
    programs do.
    """
    with atomic_path(path) as temporary:
        torch.save(dict(tensors) if counts is None else {"state_dict": dict(tensors), **counts}, temporary)
        if mark is not None:
            mark_pickle(temporary, mark)


def mark_pickle(path: Path, mark: str) -> None:
    """Store the mark and a digest of the tensors as the comment of torch's zip archive, which readers ignore; other
    formats stay unmarked."""
    if is_zipfile(path):
        content = add_digest(mark, digest_tensors(load_state_dict(path, mmap=True)))
        with ZipFile(path, "a") as archive:
            archive.comment = content.encode()
