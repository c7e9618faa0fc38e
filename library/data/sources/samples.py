"""From what was found to what is drawn: the shape of every picture, its repeats, and the buckets."""

import logging
import os
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from library.data.batches.images import read_size
from library.data.batches.order import Bucket, regularisation_repeats
from library.data.description.buckets import BucketRules, Shape, Size, assign_shapes, cover
from library.data.description.folder_audit import pictures_below
from library.data.description.schema import DatasetConfig, NoDataFound, SubsetConfig
from library.data.sources.scan import Picture, ScannedDataset, ScannedSubset, few
from library.errors import UserError

logger = logging.getLogger(__name__)

MANY_DRAWS, MAX_DRAWS = 1_000_000, 10_000_000  # of an epoch; ten million take half a minute and 1.3 GB


class Sample(NamedTuple):
    """One picture as a dataset trains it; the same picture in two datasets is two samples."""

    picture: Picture
    dataset: int
    subset: int  # counted through all datasets
    shape: Shape
    num_draws: int  # in an epoch; 0 for a regularisation picture that is not needed


@dataclass(frozen=True)
class Draws:
    """Every draw of an epoch by number, and the buckets they lie in."""

    sample_of_draw: NDArray[np.int32]
    buckets: tuple[Bucket, ...]


def check_pictures(datasets: Sequence[ScannedDataset]) -> None:
    """Raise NoDataFound where there is nothing to train on, ValueError where a subset is empty or masks do not fit."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if not any(subset.pictures and not subset.config.is_reg for subset in subsets):
        sources = [subset.config.source for subset in subsets if not subset.config.is_reg]
        below = "".join(pictures_below(source) for source in sources) + small_ones(subsets)
        raise NoDataFound(
            f"no training pictures in {few(sources)}{below}" if sources else "no subset is left to train on"
        )
    for subset in subsets:
        if not subset.pictures:
            reasons = few([f"{path}: {reason}" for path, reason in subset.dropped], 3)
            raise UserError(
                f"there are no pictures in {subset.config.source}"
                + (f" that can be used ({reasons})" if reasons else "")
                + small_ones([subset])
                + "; name another folder or leave the subset out"
            )
    for dataset in datasets:
        if dataset.config.style == "masked" and dataset.config.enable_bucket:
            check_mask_sizes([picture for subset in dataset.subsets for picture in subset.pictures])


def small_ones(subsets: Sequence[ScannedSubset]) -> str:
    """How many pictures skip_image_resolution leaves out, to be read after what there is none of."""
    count = sum(len(subset.small) for subset in subsets)
    return f"; skip_image_resolution leaves out {count} as too small, lower it to train them" if count else ""


def check_mask_sizes(pictures: Sequence[Picture]) -> None:
    """With buckets a mask is scaled and cropped like its picture, so it must have its size; ValueError names others."""
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda picture: read_size(picture.mask_path or ""), pictures))
    wrong = [
        f"{picture.mask_path} is {size[0]}x{size[1]}, its picture {picture.size[0]}x{picture.size[1]}"
        for picture, size in zip(pictures, sizes, strict=True)
        if size != picture.size
    ]
    if wrong:
        raise UserError(f"{len(wrong)} masks do not have the size of their picture: {few(wrong, 3)}")


def build_samples(datasets: Sequence[ScannedDataset], rules: Sequence[BucketRules]) -> tuple[Sample, ...]:
    """Every picture with its shape and its number of draws."""
    samples: list[Sample] = []
    first_subset = 0
    for number, (dataset, rule) in enumerate(zip(datasets, rules, strict=True)):
        draws = iter(draws_of_dataset(dataset))
        for index, subset in enumerate(dataset.subsets, first_subset):
            sizes = [picture.size for picture in subset.pictures]
            if rule.enable_bucket:
                shapes = assign_shapes(sizes, rule)
            else:
                shapes = [fixed_shape(size, rule.resolution, subset.config) for size in sizes]
            # `draws` goes on with the next subset, so it stands where the others have ended.
            rows = zip(subset.pictures, repeat(number), repeat(index), shapes, draws, strict=False)
            samples += map(Sample._make, rows)
        first_subset += len(dataset.subsets)
    return tuple(samples)


def fixed_shape(picture: Size, target: Size, subset: SubsetConfig) -> Shape:
    """The shape without buckets: just covering the target; random_crop cuts from a larger picture as it is."""
    if subset.random_crop and picture[0] >= target[0] and picture[1] >= target[1]:
        return Shape(target, picture)
    return Shape(target, cover(picture, target))


def draws_of_dataset(dataset: ScannedDataset) -> list[int]:
    """The number of draws of every picture, in order of the subsets: repeats, balanced for regularisation pictures."""
    repeats = [(subset.config, subset.config.num_repeats, len(subset.pictures)) for subset in dataset.subsets]
    num_train_draws = sum(count * pictures for config, count, pictures in repeats if not config.is_reg)
    check_draws(num_train_draws)
    reg = [n for config, count, pictures in repeats if config.is_reg for n in [count] * pictures]
    balanced = iter(regularisation_repeats(num_train_draws, reg))
    draws: list[int] = []
    for config, count, pictures in repeats:
        draws += islice(balanced, pictures) if config.is_reg else [count] * pictures
    return draws


def check_draws(num_draws: int) -> None:
    """Raise UserError where an epoch is too long to be put in order, say so where that takes a while."""
    if num_draws > MAX_DRAWS:
        raise UserError(
            f"num_repeats: an epoch would have {num_draws} samples, more than {MAX_DRAWS}; repeats only say how long "
            "an epoch is, so lower them, and give --max_train_steps or --max_train_epochs for a longer training"
        )
    if num_draws > MANY_DRAWS:
        logger.warning(
            "num_repeats: an epoch has %d samples, which are put in order before it begins; that takes a while",
            num_draws,
        )


def build_draws(samples: Sequence[Sample], configs: Sequence[DatasetConfig], chosen: Container[int]) -> Draws:
    """Number the draws and sort them into buckets, ordered by dataset and size; only those of `chosen` datasets."""
    counts = np.array([s.num_draws if s.dataset in chosen else 0 for s in samples], dtype=np.int64)
    sample_of_draw = np.repeat(np.arange(len(samples), dtype=np.int32), counts)
    keys = [(sample.dataset, sample.shape.bucket) for sample in samples]
    places = {key: place for place, key in enumerate(sorted(set(keys)))}
    place_of_draw = np.repeat(np.array([places[key] for key in keys], dtype=np.int32), counts)
    members = np.split(np.argsort(place_of_draw, kind="stable").astype(np.int32), np.cumsum(np.bincount(place_of_draw)))
    buckets = tuple(
        Bucket(dataset, size, configs[dataset].batch_size, draws)
        for (dataset, size), draws in zip(places, members, strict=False)
        if len(draws)
    )
    return Draws(sample_of_draw, buckets)


def duplicated_stems(datasets: Sequence[ScannedDataset]) -> Iterator[tuple[str, str]]:
    """Pairs of pictures of one subset that share caption file and cache names, because only their endings differ."""
    for dataset in datasets:
        for subset in dataset.subsets:
            stems = {picture.path.rpartition(".")[0] for picture in subset.pictures}
            if subset.config.style != "metadata" and len(stems) == len(subset.pictures):
                continue  # every name has an ending and there is no pair, which is soon seen
            seen: dict[str, str] = {}
            for picture in subset.pictures:
                stem = os.path.splitext(picture.path)[0]
                if stem in seen and seen[stem] != picture.path:
                    yield seen[stem], picture.path
                seen[stem] = picture.path
