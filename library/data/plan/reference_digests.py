"""Digests of reference images, kept in an index of their folder, so that only new and edited files are read."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from library.data.decoding.images import HEAD_BYTES
from library.data.decoding.index_file import pack_names, unpack_names
from library.data.plan.dataset_digest import whole_digest
from library.data.sources.folders.image_index import (
    UNSETTLED,
    Table,
    compute_stamp_of_image,
    read_stamped,
    update_table,
)
from library.data.sources.storage.index_places import IndexPlaces

FILE_NAME = ".reference_index.npz"
DIGEST_BYTES = 16


def digest_files(paths: Sequence[str], places: IndexPlaces, num_threads: int) -> dict[str, str]:
    """Return the digest of each file's whole content; "" if it cannot be read.

    A digest in the index is valid while size, modification time and status change time of its file are unchanged; on
    Windows, which has no such time, that of an uncompressed file never is.
    """
    names_by_folder: dict[str, list[str]] = {}
    for path in paths:
        names_by_folder.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    digests: dict[str, str] = {}
    for folder, names in names_by_folder.items():
        known = places.read_arrays(folder, FILE_NAME, read_table) or Table()
        table = update_table(known, folder or ".", sorted(names), read_digest, num_threads, "reading references")
        if not table.equals(known):
            places.write_arrays(folder, FILE_NAME, build_arrays(table))
        digests |= {os.path.join(folder, name): digest for name, digest in zip(table.names, table.values, strict=True)}
    return digests


def read_digest(path: str) -> tuple[int, str]:
    """Return (stamp, digest) of a file; the stamp is taken before the file is read."""
    try:
        stamp = compute_stamp_of_image(*read_stamped(path, HEAD_BYTES), time.time_ns())
    except OSError:
        return UNSETTLED, ""
    digest = whole_digest(path)
    return (stamp if digest else UNSETTLED), digest


def build_arrays(table: Table[str]) -> dict[str, Any]:
    digests = b"".join(bytes.fromhex(digest).ljust(DIGEST_BYTES, b"\0") for digest in table.values)
    return {"names": pack_names(table.names), "stamps": table.stamps, "digests": np.frombuffer(digests, dtype=np.uint8)}


def read_table(arrays: Mapping[str, Any]) -> Table[str]:
    """Return the table of an index. Raises ValueError if its columns have different lengths."""
    names, stamps = unpack_names(arrays["names"]), np.asarray(arrays["stamps"])
    digests_N16 = np.asarray(arrays["digests"], dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    if stamps.dtype != np.int64 or not len(names) == len(digests_N16) == stamps.size:
        raise ValueError("its columns do not fit together")
    return Table(names, stamps.reshape(-1), [row.tobytes().hex() for row in digests_N16])
