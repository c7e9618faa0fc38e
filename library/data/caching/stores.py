"""The caches from the point of view of batches: which samples have latents or text features, and where."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from library.data.caching.latent_files import LatentFile, Latents, latent_file
from library.data.caching.text_files import Row, TextFile
from library.data.plan.samples import Sample
from library.data.sources.folders.image_index import compute_stamp
from library.data.sources.storage.storage import Storage
from library.protocols import LatentSpec

FileT = TypeVar("FileT")


def default_latent_file(spec: LatentSpec, sample: Sample, storage: Storage) -> LatentFile:
    """Return the usual location of a sample's latents."""
    return latent_file(storage.cache_stem(sample.image), sample.image.size, sample.shape, spec)


def default_text_file(suffix: str, keys: tuple[str, ...], sample: Sample, storage: Storage) -> TextFile:
    """Return the location of a sample's text features; samples that share an image share the file."""
    return TextFile(os.path.abspath(storage.cache_stem(sample.image)) + suffix, keys)


def stamp_of_file(path: str) -> int:
    """Return a number that changes when a file is replaced; 0 for a missing file."""
    try:
        return compute_stamp(os.stat(path))
    except OSError:
        return 0


def no_file(sample: Sample, storage: Storage) -> NoReturn:
    raise AssertionError("no sample has a file here")


@dataclass(frozen=True, eq=False)
class CacheFiles(Generic[FileT]):
    """The files of a cache. Their names follow from the samples, so only their existence is stored."""

    default_file: Callable[[Sample, Storage], FileT] = no_file
    has_N: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    renamed_files: Mapping[int, FileT] = field(default_factory=dict)  # files with other names, by sample
    stamps_N: NDArray[np.int64] | None = None  # of the files as they were checked

    def __contains__(self, number: int) -> bool:
        return number < len(self.has_N) and bool(self.has_N[number])

    def file(self, number: int, sample: Sample, storage: Storage) -> FileT:
        """Return the file of a sample, which must have one."""
        return self.renamed_files.get(number) or self.default_file(sample, storage)

    def has_changed(self, number: int, path: str) -> bool:
        """Return True if the file of a sample is not the one that was checked."""
        return self.stamps_N is not None and stamp_of_file(path) != self.stamps_N[number]


@dataclass(frozen=True)
class LatentStore:
    """The latents of a run, by sample index."""

    files: CacheFiles[LatentFile] = field(default_factory=CacheFiles)
    memory: Mapping[int, Latents] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()  # samples of damaged images, which are replaced by others
    vae: str | None = None  # which has made the files; None if they were not checked


@dataclass(frozen=True)
class TextStore:
    """The text features of a run, in a file per sample or in memory by caption."""

    files: CacheFiles[TextFile] = field(default_factory=CacheFiles)
    memory: Mapping[str, Row] = field(default_factory=dict)
    padding: Mapping[str, float] = field(default_factory=dict)  # padding value of keys of varying length


NO_LATENTS, NO_TEXTS = LatentStore(), TextStore()
