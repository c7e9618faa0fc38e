"""Listing of the images that a dataset description names, from any source."""

import logging
import math
import os
from collections.abc import Callable, Set
from dataclasses import replace

import numpy as np

from library.base.errors import list_few
from library.data.description.buckets import Size
from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.data.sources.storage.source import load_source
from library.data.sources.storage.storage import Storage
from library.options.encodings import NotUtf8

logger = logging.getLogger(__name__)


def collect(config: RunDataConfig, storage: Storage | None = None, num_threads: int = 16) -> tuple[ScannedDataset, ...]:
    """List the images of every subset, and read their captions and headers.

    Raises UserError for missing folders, files and masks. Texts that are not UTF-8 are collected, and raised as one
    NotUtf8 for all subsets.
    """
    storage, encodings = storage or Storage(), list[str]()
    check_packages(config)  # before the first is scanned, which may take minutes

    def scan(subset: SubsetConfig) -> ScannedSubset | None:
        try:
            scanned = load_source(subset.source_key).scan(subset, storage, num_threads)
        except NotUtf8 as error:
            encodings.append(str(error))
            return None
        return replace(scanned, images=replace(scanned.images, cache_directory=subset.cache_directory))

    datasets = tuple(collect_dataset(dataset, scan) for dataset in config.datasets)
    if encodings:
        raise NotUtf8("\n".join(encodings))
    return datasets


def check_packages(config: RunDataConfig) -> None:
    """Raise UserError naming what to install if a package is missing that any of the sources needs."""
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        load_source(subset.source_key).check_packages(subset)


def collect_dataset(config: DatasetConfig, scan: Callable[[SubsetConfig], ScannedSubset | None]) -> ScannedDataset:
    """List the images of one dataset. A source that is repeated in it is skipped with a warning."""
    subsets, seen = [], set()
    for subset in config.subsets:
        source = subset.source if subset.patterns else os.path.normcase(os.path.abspath(subset.source))
        if source in seen:
            logger.warning("%s is listed twice in one dataset; the second one is ignored", subset.source)
            continue
        seen.add(source)
        limit = config.skip_image_resolution
        if (scanned := scan(subset)) is not None:
            scanned = drop_excluded(scanned) if subset.exclude else scanned
            subsets.append(scanned if limit is None else drop_small(scanned, limit))
    return ScannedDataset(config, tuple(subsets))


def drop_small(subset: ScannedSubset, limit: Size) -> ScannedSubset:
    """Keep only images with an area larger than that of `limit`. The captions of the others are not reported as
    missing or empty."""
    sizes_N2 = subset.images.sizes_N2.astype(np.int64)
    small = subset.images.keys_at(np.flatnonzero(sizes_N2.prod(axis=1) <= math.prod(limit)))
    return replace(drop(subset, set(small)), small=small)


def drop_excluded(subset: ScannedSubset) -> ScannedSubset:
    """Keep only images that the subset does not exclude; warn about names that none has."""
    folder = subset.config.image_dir or ""
    excluded = {os.path.join(folder, name) for name in subset.config.exclude}
    known = {*subset.images.each_key(), *(path for path, _ in subset.dropped)}
    if unknown := [os.path.basename(path) for path in sorted(excluded - known)]:
        logger.warning("exclude names what is no image in %s: %s", folder, list_few(unknown))
    kept = tuple(pair for pair in subset.dropped if pair[0] not in excluded)
    return replace(drop(subset, excluded), dropped=kept)


def drop(subset: ScannedSubset, left_out: Set[str]) -> ScannedSubset:
    """Remove images by their keys."""
    is_kept = np.fromiter((key not in left_out for key in subset.images.each_key()), bool, len(subset.images))
    return replace(
        subset,
        images=subset.images.take(np.flatnonzero(is_kept)),
        without_caption=tuple(path for path in subset.without_caption if path not in left_out),
        empty_caption=tuple(path for path in subset.empty_caption if path not in left_out),
    )
