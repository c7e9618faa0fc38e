"""Listing of the images that a data description names, from any source."""

import logging
import math
import os
from dataclasses import replace

import numpy as np

from library.data.description.buckets import Size
from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.data.sources.storage.source import load_source
from library.data.sources.storage.storage import Storage

logger = logging.getLogger(__name__)


def collect(config: RunDataConfig, storage: Storage | None = None, num_threads: int = 16) -> tuple[ScannedDataset, ...]:
    """List the images of every subset, and read their captions and headers.

    Raises UserError for missing folders and files, captions that are not UTF-8 and missing masks.
    """
    storage = storage or Storage()
    return tuple(collect_dataset(dataset, storage, num_threads) for dataset in config.datasets)


def collect_dataset(config: DatasetConfig, storage: Storage, num_threads: int) -> ScannedDataset:
    """Return the images of one dataset; repeated sources are skipped."""
    subsets, seen = [], set()
    for subset in config.subsets:
        source = subset.source if subset.patterns else os.path.normcase(os.path.abspath(subset.source))
        if source in seen:
            logger.warning("%s is listed twice in one dataset; the second one is ignored", subset.source)
            continue
        seen.add(source)
        found = collect_subset(subset, storage, num_threads)
        limit = config.skip_image_resolution
        subsets.append(found if limit is None else without_small(found, limit))
    return ScannedDataset(config, tuple(subsets))


def without_small(found: ScannedSubset, limit: Size) -> ScannedSubset:
    """Keep only images of a larger area than `limit`; captions of the others are not reported."""
    sizes_N2 = found.pictures.sizes_N2.astype(np.int64)
    is_small = sizes_N2.prod(axis=1) <= math.prod(limit)
    small = found.pictures.keys_at(np.flatnonzero(is_small))
    left_out = set(small)
    return replace(
        found,
        pictures=found.pictures.take(np.flatnonzero(~is_small)),
        without_caption=tuple(path for path in found.without_caption if path not in left_out),
        empty_caption=tuple(path for path in found.empty_caption if path not in left_out),
        small=small,
    )


def collect_subset(config: SubsetConfig, storage: Storage, num_threads: int) -> ScannedSubset:
    """Return the images of one subset, in the order of their paths, or of their places in larger files."""
    return load_source(config.source_key).scan(config, storage, num_threads)
