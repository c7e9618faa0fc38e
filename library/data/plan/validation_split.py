"""The split of images into training and validation.

An image is on one side of the run. Copies of it in several subsets stay together. An image that is also used for
regularisation is always trained; an image that any subset holds out is trained in none.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from library.base.errors import error_in, of_file
from library.base.randomness import stream_seed
from library.data.description.schema import SubsetConfig
from library.data.plan.folder_audit import Line
from library.data.scanned.images import END_BYTES, ScannedImage, digest_of_ends
from library.data.scanned.subsets import ScannedDataset, ScannedSubset


@dataclass(frozen=True)
class SplitSpec:
    """The share of images that a subset wants to hold out."""

    identities: Sequence[str]  # of the subset's images; copies share one
    share: float  # 0..1
    seed: int


@dataclass(frozen=True)
class Split:
    """The two sides of a split, without empty subsets and datasets."""

    trained: tuple[ScannedDataset, ...]
    set_aside: tuple[ScannedDataset, ...]  # with settings that make every draw the same
    # Key of a held-out image -> identity, which its copies share.
    identities: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()  # log lines about the split


def split_datasets(datasets: Sequence[ScannedDataset], seed: int) -> Split:
    """Hold out images according to validation_split and validation_seed (default: `seed`) of each subset.

    Raises UserError if no image is left to train on, or if an image cannot be read.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if not any(held_out_share(subset.config) for subset in subsets):
        return Split(tuple(datasets), ())
    # By id, because subsets contain arrays and have no hash.
    identities = dict(zip(map(id, subsets), identities_by_subset(subsets), strict=True))
    specs = [
        SplitSpec(identities[id(subset)], held_out_share(subset.config), subset_seed(subset.config, seed))
        for subset in subsets
        if held_out_share(subset.config)
    ]
    always_trained = {identity for subset in subsets if subset.config.is_reg for identity in identities[id(subset)]}
    aside = choose(specs, always_trained)
    # By the id of the subset: its images that are held out, and those that are not.
    sides = {id(subset): divide(subset, [i in aside for i in identities[id(subset)]]) for subset in subsets}
    identity_by_key: dict[str, str] = {}
    lines: list[Line] = []
    for subset in subsets:
        images = sides[id(subset)][0].images
        held_out_identities = (identity for identity in identities[id(subset)] if identity in aside)
        identity_by_key.update(zip(images.each_key(), held_out_identities, strict=True))
        lines += split_lines(subset, len(images))
    trained = drop_empty(
        replace(dataset, subsets=tuple(sides[id(subset)][1] for subset in dataset.subsets)) for dataset in datasets
    )
    if not any(not subset.config.is_reg for dataset in trained for subset in dataset.subsets):
        raise error_in("validation_split")(
            "validation_split and is_forgetting_probe hold out every image, so nothing is left to train on",
            "use less than 1.0, and leave some subset without is_forgetting_probe",
        )
    return Split(
        trained, drop_empty(take_held_out(dataset, sides) for dataset in datasets), identity_by_key, tuple(lines)
    )


def divide(subset: ScannedSubset, are_aside: Sequence[bool]) -> tuple[ScannedSubset, ScannedSubset]:
    """Return the subset with the images that are held out, and with the others."""
    aside_N = np.array(are_aside, dtype=bool)
    held_out, others = (
        replace(subset, images=subset.images.take(np.flatnonzero(rows_N))) for rows_N in (aside_N, ~aside_N)
    )
    return held_out, others


def take_held_out(dataset: ScannedDataset, sides: Mapping[int, tuple[ScannedSubset, ScannedSubset]]) -> ScannedDataset:
    """Return the dataset with held-out images only. Other subsets only leave out their copies of them."""
    subsets = (
        replace(sides[id(subset)][0], config=unchanging(subset.config))
        for subset in dataset.subsets
        if held_out_share(subset.config)
    )
    return replace(dataset, subsets=tuple(subsets))


def choose(specs: Sequence[SplitSpec], always_trained: AbstractSet[str]) -> set[str]:
    """Return the identities of held-out images.

    Of n images a subset holds out round(n * share), with halves to even, but fewer than n unless the share is 1. It
    takes those with the lowest rank, a hash of seed and identity. Images that another subset holds out count toward its
    number; images that another subset keeps are not available. Larger shares choose first.
    """
    aside: set[str] = set()
    trained = set(always_trained)
    # A subset that holds out everything must choose before another one claims its copies for training.
    for spec in sorted(specs, key=lambda spec: -spec.share):
        counts = Counter(spec.identities)
        num_images = len(spec.identities)
        limit = num_images if spec.share == 1 else num_images - 1
        num_wanted = min(round(num_images * spec.share), limit)
        num_aside = sum(count for identity, count in counts.items() if identity in aside)
        available = counts.keys() - aside - trained
        # Ranks do not depend on the share, so a larger share holds out the same images and more.
        ranks = {identity: stream_seed(spec.seed, "validation split", identity) for identity in available}
        for identity in sorted(available, key=lambda identity: (ranks[identity], identity)):
            if num_aside >= num_wanted:
                break
            if num_aside + counts[identity] <= limit:
                aside.add(identity)
                num_aside += counts[identity]
        trained |= counts.keys() - aside
    return aside


def held_out_share(config: SubsetConfig) -> float:
    """Return the share of images that a subset holds out: 0 for regularisation images, 1 for a forgetting probe."""
    if config.is_forgetting_probe:
        return 1.0
    return 0.0 if config.is_reg else config.validation_split


def subset_seed(config: SubsetConfig, seed: int) -> int:
    return seed if config.validation_seed is None else config.validation_seed


def unchanging(config: SubsetConfig) -> SubsetConfig:
    """Return the settings of a subset without random changes and with each image once."""
    captions = replace(
        config.captions,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )
    return replace(
        config,
        num_repeats=1,
        captions=captions,
        flip_aug=False,
        color_aug=False,
        brightness_aug=0.0,
        contrast_aug=0.0,
        saturation_aug=0.0,
        random_crop=False,
        face_crop_aug_range=None,
    )


def drop_empty(datasets: Iterator[ScannedDataset]) -> tuple[ScannedDataset, ...]:
    """Drop subsets without images, and datasets without subsets."""
    filled = [replace(d, subsets=tuple(subset for subset in d.subsets if subset.images)) for d in datasets]
    return tuple(dataset for dataset in filled if dataset.subsets)


def split_lines(subset: ScannedSubset, num_aside: int) -> Iterator[Line]:
    config, num_images = subset.config, len(subset.images)
    share = held_out_share(config)
    if config.is_forgetting_probe and num_aside:
        yield logging.INFO, f"  {config.source}: {num_aside} of {num_images} images are a forgetting probe, not trained"
    elif share and num_aside:
        yield logging.INFO, f"  {config.source}: {num_aside} of {num_images} images are held out for validation"
    elif share:
        reason = f"{share:g} of {num_images} images rounds to none"
        if round(num_images * share):
            reason = "the others are trained in other subsets or as regularisation images, or it is the only one"
        yield logging.WARNING, f"  {config.source}: validation_split {share:g} holds out no image: {reason}"
    elif num_aside:
        effect = "are not trained: another subset holds them out for validation"
        yield logging.WARNING, f"  {config.source}: {num_aside} of {num_images} images {effect}"


# Identities


def identities_by_subset(subsets: Sequence[ScannedSubset]) -> list[list[str]]:
    """Return the identity of every image of each subset, which copies share: a hash of the file, or the digest in
    the index of larger files."""
    files = sorted({key for subset in subsets if subset.images.locations is None for key in subset.images.each_key()})
    identity_by_path = hash_files(files)
    return [
        [identity_by_path[key] for key in subset.images.each_key()]
        if (locations := subset.images.locations) is None
        else [digest.tobytes().hex() for digest in locations.digest_N16]
        for subset in subsets
    ]


def identities_of_images(images: Iterable[ScannedImage]) -> dict[str, str]:
    location_by_key = {image.key: image.location for image in images}
    identity_by_path = hash_files([key for key, location in location_by_key.items() if location is None])
    return identity_by_path | {
        key: location.digest for key, location in location_by_key.items() if location is not None
    }


def hash_files(paths: Sequence[str]) -> dict[str, str]:
    """Return the identity of each file. Copies share it, regardless of folder and name."""
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(paths, pool.map(hash_file, paths), strict=True))


def hash_file(path: str) -> str:
    """Return a hash of a file's size, start and end. Compressed images with equal hashes are copies.

    Raises UserError naming a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(END_BYTES)
            file.seek(max(0, size - END_BYTES))
            ends += file.read(END_BYTES)
    except OSError as error:
        raise of_file(path, cause="unreadable")(f"cannot be read: {error.strerror}") from None
    return digest_of_ends(ends, size)
