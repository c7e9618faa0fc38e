"""An index of latent cache entries that were found valid, whose files need not be opened again while nothing changes.

Each image folder has one index file, a numpy archive with a row per entry: its name, the stamp of its file, and a mark.
The mark is a digest of everything on which `judge` depends: the image and its stamp, shape, filter, VAE. A missing or
damaged index only costs time.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from library.data.caching.latent_files import Expected, LatentFile, judge
from library.data.decoding.index_file import pack_names, read_arrays, unpack_names, write_arrays
from library.data.decoding.npz import MISSING, Verdict
from library.data.description.image_extensions import is_uncompressed
from library.data.scanned.images import ScannedImage
from library.data.sources.folders import image_index
from library.data.sources.folders.image_index import UNSETTLED, compute_stamp
from library.data.sources.storage.storage import Storage

FILE_NAME = ".latent_index.npz"
VERSION = 1
FOREIGN = 1  # bit of a mark: the entry was written by another program

Rows = dict[str, tuple[int, int]]
"""Stamp and mark by the name of the entry."""


@dataclass
class VerifiedEntries:
    """The indices of a run's folders, and the additions of this run."""

    known: dict[str, Rows]
    storage: Storage
    sure: dict[str, Rows] = field(default_factory=dict)
    marks: dict[tuple[str, str], int] = field(default_factory=dict)  # by path and key suffix
    written: dict[tuple[str, str], int] = field(default_factory=dict)  # stamps of files written by this run
    stamps: dict[str, int] = field(default_factory=dict)  # of files that were found valid or written

    @classmethod
    def open(cls, paths: Iterable[str], storage: Storage) -> "VerifiedEntries":
        """Read the indices of the folders of these files."""
        return cls({folder: read_rows(folder) for folder in set(map(os.path.dirname, paths))}, storage)

    def verdict(self, file: LatentFile, image: ScannedImage, expected: Expected) -> Verdict:
        """Return the verdict of `judge`, taken from the index if nothing has changed."""
        folder, name = os.path.split(file.path)
        now_ns = time.time_ns()
        image_stamps = [self.stamp_of_image(each, now_ns) for each in (image, *image.references)]
        mark = compute_mark(file, image, image_stamps, expected)
        if UNSETTLED not in image_stamps:
            self.marks[file.path, file.tail] = mark
        try:
            status = os.stat(file.path)
        except OSError:
            return Verdict(MISSING)
        stamp = compute_stamp(status, now_ns)
        is_resolved = UNSETTLED not in (stamp, *image_stamps)
        row = self.known.get(folder, {}).get(name + file.tail)
        if is_resolved and row is not None and row[0] == stamp and row[1] | FOREIGN == mark | FOREIGN:
            entry_verdict = Verdict(None, is_foreign=bool(row[1] & FOREIGN))
        else:
            entry_verdict = judge(file, image, expected, self.storage)
        if entry_verdict.fault is None:
            self.stamps[file.path] = stamp or compute_stamp(status)
        if is_resolved and entry_verdict.fault is None:
            self.sure.setdefault(folder, {})[name + file.tail] = (
                stamp,
                mark | FOREIGN if entry_verdict.is_foreign else mark,
            )
        return entry_verdict

    def stamp_of_image(self, image: ScannedImage, now_ns: float) -> int:
        """Return a number that changes when an image is replaced; UNSETTLED if nothing but its content tells."""
        # The ends of an uncompressed image, and size and time on Windows, which has no time of the status change.
        if is_uncompressed(image.key) and (image.location is not None or os.name == "nt"):
            return UNSETTLED
        # hash() of a tuple of integers is the same in every process, so it can be stored.
        if image.location is not None:
            return hash(self.storage.version(image))
        return compute_stamp(os.stat(image.key), now_ns)

    def note_written(self, file: LatentFile) -> None:
        """Record that this run has just written an entry."""
        self.written[file.path, file.tail] = self.stamps[file.path] = compute_stamp(os.stat(file.path))

    def write(self) -> None:
        """Write the indices. Entries written a moment ago are left out, because they may still change; they will be
        checked again."""
        now_ns = time.time_ns()
        for (path, tail), written in self.written.items():
            folder, name = os.path.split(path)
            # Another run may have replaced the entry meanwhile.
            if (path, tail) in self.marks and os.path.exists(path) and compute_stamp(os.stat(path), now_ns) == written:
                self.sure.setdefault(folder, {})[name + tail] = written, self.marks[path, tail]
        for folder, rows in self.sure.items():
            known = self.known.get(folder, {})
            if len(rows) >= image_index.MIN_FILES and rows.items() - known.items():
                write_rows(folder, known | rows)


def compute_mark(file: LatentFile, image: ScannedImage, image_stamps: Sequence[int], expected: Expected) -> int:
    """Return a digest of everything that an entry is checked against: 63 bits, of which the last is 0."""
    image_stamp, *reference_stamps = image_stamps
    checked: tuple[object, ...] = (
        os.path.basename(image.key), image.size, image_stamp, file.tail, file.latent_shape, file.bucket,
    )  # fmt: skip
    if image.references:
        names = [os.path.basename(reference.key) for reference in image.references]
        checked += (names, reference_stamps, file.reference_shapes, expected.shape.references)
    if expected.seen:
        checked += (expected.seen,)
    # File names may contain bytes that are not valid text.
    digest = blake2b(repr((VERSION, checked, expected)).encode(errors="surrogatepass"), digest_size=8)
    # 63 bits, because the archive holds signed integers; the last one is the FOREIGN bit.
    return (int.from_bytes(digest.digest(), "little") >> 1) & ~FOREIGN


def read_rows(folder: str) -> Rows:
    """Read the rows of a folder's index; none if it is missing or damaged."""

    def read(archive: Mapping[str, Any]) -> Rows:
        entries = zip(archive["stamps"].tolist(), archive["marks"].tolist(), strict=True)
        return dict(zip(unpack_names(archive["names"]), entries, strict=True))

    return read_arrays(Path(folder) / FILE_NAME, read) or {}


def write_rows(folder: str, rows: Rows) -> None:
    """Write the index of a folder atomically, if the folder is writable."""
    table = np.array(list(rows.values()), dtype=np.int64)
    arrays = {"names": pack_names(list(rows)), "stamps": table[:, 0], "marks": table[:, 1]}
    write_arrays(Path(folder) / FILE_NAME, arrays)
