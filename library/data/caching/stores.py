"""What the caches hand on to whoever draws batches: which samples have latents or text features, and where.

Names of files follow from the samples, so nothing is kept for each but whether it has one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from library.data.caching.latent_files import LatentFile, Latents, latent_file
from library.data.caching.text_files import Row, TextFile
from library.data.sources.samples import Sample, Samples
from library.data.sources.storage import Storage
from library.protocols import LatentSpec


def _nobody() -> NDArray[np.bool_]:
    return np.empty(0, dtype=bool)


def usual_latent_file(sample: Sample, spec: LatentSpec, storage: Storage) -> LatentFile:
    """Where the latents of a sample lie if nothing speaks against it."""
    return latent_file(storage.cache_stem(sample.picture), sample.picture.size, sample.shape, spec)


@dataclass(frozen=True, eq=False)
class LatentFiles:
    """The latents on disk."""

    spec: LatentSpec | None = None
    has_N: NDArray[np.bool_] = field(default_factory=_nobody)
    others: Mapping[int, LatentFile] = field(default_factory=dict)  # files that are called otherwise, by sample

    @classmethod
    def of(cls, files: Mapping[int, LatentFile], samples: Samples, spec: LatentSpec, storage: Storage) -> "LatentFiles":
        """These files, by number of the sample."""
        has_N = np.zeros(len(samples), dtype=bool)
        has_N[list(files)] = True
        others = {
            number: file for number, file in files.items() if usual_latent_file(samples[number], spec, storage) != file
        }
        return cls(spec, has_N, others)

    def __contains__(self, number: int) -> bool:
        return number < len(self.has_N) and bool(self.has_N[number])

    def file(self, number: int, sample: Sample, storage: Storage) -> LatentFile:
        """The file of a sample that has one."""
        assert self.spec is not None
        return self.others.get(number) or usual_latent_file(sample, self.spec, storage)


@dataclass(frozen=True)
class LatentStore:
    """The latents of a run, by number of the sample."""

    files: LatentFiles = field(default_factory=LatentFiles)
    memory: Mapping[int, Latents] = field(default_factory=dict)
    damaged: frozenset[int] = frozenset()  # samples whose pictures are, for which others stand in


@dataclass(frozen=True, eq=False)
class TextFiles:
    """The text features on disk."""

    suffix: str = ""
    keys: tuple[str, ...] = ()
    has_N: NDArray[np.bool_] = field(default_factory=_nobody)

    def __contains__(self, number: int) -> bool:
        return number < len(self.has_N) and bool(self.has_N[number])

    def file(self, sample: Sample, storage: Storage) -> TextFile:
        """The file of a sample that has one; samples that share a picture share it."""
        return TextFile(os.path.abspath(storage.cache_stem(sample.picture)) + self.suffix, self.keys)


@dataclass(frozen=True)
class TextStore:
    """The text features of a run: in the file of a sample, or else in memory, by caption."""

    files: TextFiles = field(default_factory=TextFiles)
    memory: Mapping[str, Row] = field(default_factory=dict)
    padding: Mapping[str, float] = field(default_factory=dict)  # what fills a key whose captions differ in length


NO_LATENTS, NO_TEXTS = LatentStore(), TextStore()
