"""Hashes by which programs identify models and adapters."""

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from library.checkpoints.headers import LENGTH_BYTES

LEGACY_OFFSET = 0x100000
LEGACY_BYTES = 0x10000


def sshs_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return (`sshs_model_hash`, `sshs_legacy_hash`) of tensors in their final dtype.

    The first is the SHA-256 of the tensor data in file order, without the metadata. The second is the first 8 hex
    digits of the SHA-256 of the 64 KiB at offset 1 MiB of a safetensors file whose metadata has only the ss_* entries.
    """
    from safetensors.torch import save

    # Users edit the other entries later, and the hash must still identify the adapter.
    ss_metadata = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    file_bytes = memoryview(save({name: tensor.contiguous() for name, tensor in tensors.items()}, ss_metadata))
    (header_bytes,) = struct.unpack("<Q", file_bytes[:LENGTH_BYTES])
    model_hash = hashlib.sha256(file_bytes[LENGTH_BYTES + header_bytes :]).hexdigest()
    return model_hash, _short(file_bytes[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_BYTES])


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with both sshs hashes of these tensors, replacing existing ones."""
    model_hash, legacy_hash = sshs_hashes(tensors, metadata)
    return {**metadata, "sshs_model_hash": model_hash, "sshs_legacy_hash": legacy_hash}


def webui_hash(path: str | Path) -> str:
    """Return `ss_sd_model_hash`: the first 8 hex digits of the SHA-256 of the 64 KiB at offset 1 MiB of a file.

    Returns "NOFILE" if there is no file, and "IsADirectory" for a folder.
    """
    path = Path(path)
    if not path.is_file():
        return _word_for_no_file(path)
    with path.open("rb") as file:
        file.seek(LEGACY_OFFSET)
        return _short(file.read(LEGACY_BYTES))


def sha256_of_file(path: str | Path) -> str:
    """Return `ss_new_sd_model_hash`: the SHA-256 of a file, 64 hex digits.

    Returns "NOFILE" if there is no file, and "IsADirectory" for a folder.
    """
    path = Path(path)
    return _hash_content(path, hashlib.sha256()) if path.is_file() else _word_for_no_file(path)


def sha256_of_tensors(path: Path) -> str:
    """Return `sshs_model_hash` of a safetensors file: the SHA-256 of what follows its header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
        file.seek(header_bytes, os.SEEK_CUR)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the BLAKE2b digest of a file, 32 hex digits; used to detect changes of our own files."""
    return _hash_content(path, hashlib.blake2b(digest_size=16))


def _word_for_no_file(path: Path) -> str:
    return "IsADirectory" if path.is_dir() else "NOFILE"


def _hash_content(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def _short(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:8]
