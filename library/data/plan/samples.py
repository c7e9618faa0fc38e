"""The samples of a run: the shape of every image, its repeats, and its bucket."""

import logging
import os
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, islice, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from library.base.errors import NoDataFound, UserError, about, error_in, list_few, of_file
from library.data.decoding.images import Pixels, read_size
from library.data.description.buckets import BucketRules, ReferenceRules, Shape, Size, assign_shapes, cover
from library.data.description.image_extensions import describe_unread
from library.data.description.schema import DatasetConfig, SubsetConfig
from library.data.plan.folder_audit import images_below
from library.data.plan.order import Bucket, regularisation_repeats
from library.data.scanned.columns import Column, join_columns
from library.data.scanned.images import ScannedImage, ScannedImages, iterate_in_blocks
from library.data.scanned.subsets import ScannedDataset, ScannedSubset

logger = logging.getLogger(__name__)

MANY_DRAWS, MAX_DRAWS = 1_000_000, 10_000_000  # per epoch; ten million take half a minute and 1.3 GB


class Sample(NamedTuple):
    """An image as a dataset trains it. The same image in two datasets is two samples."""

    image: ScannedImage
    dataset: int
    subset: int  # index over all datasets
    shape: Shape
    num_draws: int  # per epoch; 0 for a regularisation image that is not needed


@dataclass(frozen=True, eq=False)
class Samples(Column[Sample]):
    """The N samples of a run, as columns. Objects are created on access."""

    subsets: tuple[ScannedImages, ...] = ()
    dataset_of_subset: tuple[int, ...] = ()
    shapes: tuple[Shape, ...] = ()
    shape_N: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))  # index into `shapes`
    draws_N: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.draws_N)

    @cached_property
    def ends(self) -> list[int]:
        """The index after the last sample of each subset."""
        return list(accumulate(map(len, self.subsets)))

    def item(self, index: int) -> Sample:
        subset = bisect_right(self.ends, index)
        images = self.subsets[subset]
        image = images[index - self.ends[subset] + len(images)]
        shape = self.shapes[self.shape_N[index]]
        return Sample(image, self.dataset_of_subset[subset], subset, shape, int(self.draws_N[index]))

    def __iter__(self) -> Iterator[Sample]:
        first = 0
        for subset, (dataset, images) in enumerate(zip(self.dataset_of_subset, self.subsets, strict=True)):
            subset_rows = slice(first, first + len(images))
            shapes = map(self.shapes.__getitem__, iterate_in_blocks(self.shape_N[subset_rows]))
            # Not strict, because repeat() never ends.
            rows = zip(
                images,
                repeat(dataset),
                repeat(subset),
                shapes,
                iterate_in_blocks(self.draws_N[subset_rows]),
                strict=False,
            )
            yield from map(Sample._make, rows)
            first += len(images)

    def subset_of_each(self) -> NDArray[np.int32]:
        """Return the subset of each sample, as an index over all datasets."""
        return np.repeat(np.arange(len(self.subsets), dtype=np.int32), list(map(len, self.subsets)))

    def dataset_of_each(self) -> NDArray[np.int32]:
        return np.repeat(np.array(self.dataset_of_subset, dtype=np.int32), list(map(len, self.subsets)))

    def slice_of(self, dataset: int) -> slice:
        """Return the indices of a dataset's samples."""
        edges = [0, *self.ends]
        subsets = [index for index, number in enumerate(self.dataset_of_subset) if number == dataset]
        return slice(edges[subsets[0]], edges[subsets[-1] + 1]) if subsets else slice(0, 0)

    def keys_at(self, numbers: NDArray[Any]) -> list[str]:
        """Return the image keys of these samples, whose numbers must be sorted."""
        keys: list[str] = []
        first = 0
        for images in self.subsets:
            subset_numbers = numbers[(numbers >= first) & (numbers < first + len(images))]
            keys += images.keys_at(subset_numbers - first)
            first += len(images)
        return keys

    @property
    def references(self) -> list[ScannedImage]:
        return [reference for images in self.subsets for row in images.references or () for reference in row]

    @property
    def mask_paths(self) -> list[str]:
        """The files of all masks, image by image."""
        return [path for images in self.subsets for path in images.masks or ()]

    def sizes(self) -> NDArray[np.int32]:
        """Width and height of each image, shape (N, 2)."""
        return np.concatenate([np.empty((0, 2), dtype=np.int32), *(images.sizes_N2 for images in self.subsets)])

    def changed(self, shapes: Mapping[int, Shape], draws_N: NDArray[np.int32]) -> "Samples":
        """Return a copy with other numbers of draws, and with other shapes for the samples in `shapes`."""
        shape_N = self.shape_N.copy()
        for shape_index, number in enumerate(shapes, len(self.shapes)):
            shape_N[number] = shape_index
        return replace(self, shapes=(*self.shapes, *shapes.values()), shape_N=shape_N, draws_N=draws_N)


@dataclass(frozen=True)
class Draws:
    """All draws of an epoch by number, and their buckets."""

    sample_of_draw: NDArray[np.int32]
    buckets: tuple[Bucket, ...]


def check_images(datasets: Sequence[ScannedDataset]) -> None:
    """Raise NoDataFound if there are no training images, UserError if a subset is empty or masks do not have the
    size of their images."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if not any(subset.images and not subset.config.is_reg for subset in subsets):
        sources = [subset.config.source for subset in subsets if not subset.config.is_reg]
        unread = describe_unread(name for subset in subsets for name in subset.aside)
        below = "".join(map(images_below, sources)) + unread + describe_skipped(subsets)
        raise NoDataFound(
            f"no training images in {list_few(sources)}{below}" if sources else "no subset is left to train on"
        )
    for subset in subsets:
        if not subset.images:
            reasons = list_few([f"{path}: {reason}" for path, reason in subset.dropped], 3)
            raise UserError(
                f"there are no images in {subset.config.source}"
                + (f" that can be used ({reasons})" if reasons else "")
                + describe_unread(subset.aside)
                + describe_skipped([subset])
                + "; use another folder or remove the subset"
            )
    for dataset in datasets:
        if dataset.config.style == "masked" and dataset.config.enable_bucket:
            check_mask_sizes([image for subset in dataset.subsets for image in subset.images])


def describe_skipped(subsets: Sequence[ScannedSubset]) -> str:
    """Return a remark on the images skipped by skip_image_resolution, or ""."""
    count = sum(len(subset.small) for subset in subsets)
    return f"; skip_image_resolution skips {count} as too small; lower it to train them" if count else ""


def check_mask_sizes(images: Sequence[ScannedImage]) -> None:
    """Raise UserError for masks that do not have the size of their image, because buckets scale and crop both alike."""
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda image: read_size(image.mask_path or ""), images))
    wrong = [
        f"{image.mask_path} is {size[0]}x{size[1]}, its image {image.size[0]}x{image.size[1]}"
        for image, size in zip(images, sizes, strict=True)
        if size != image.size
    ]
    if wrong:
        raise error_in("conditioning_data_dir", cause="does not fit")(
            f"{len(wrong)} masks do not have the size of their image: {list_few(wrong, 3)}"
        )


def build_samples(datasets: Sequence[ScannedDataset], rules: Sequence[BucketRules]) -> Samples:
    """Return the samples of these datasets, with their shapes and numbers of draws."""
    shapes: dict[Shape, int] = {}
    columns: list[NDArray[np.int32]] = []
    draws: list[NDArray[np.int32]] = []
    for dataset, rule in zip(datasets, rules, strict=True):
        draws.append(draws_of_dataset(dataset))
        for subset in dataset.subsets:
            sizes_M, size_N = unique_sizes(subset.images)
            sizes = [image_size for image_size, *_ in sizes_M]
            if rule.enable_bucket:
                size_shapes = assign_shapes(sizes, rule)
            else:
                size_shapes = [resolve_fixed_shape(size, rule.resolution, subset.config) for size in sizes]
            if subset.images.references is not None:
                size_shapes = with_references(size_shapes, sizes_M, subset.config, rule.needed_step)
            shape_indices = [shapes.setdefault(shape, len(shapes)) for shape in size_shapes]
            columns.append(np.array(shape_indices, dtype=np.int32)[size_N])
    subsets = tuple(subset.images for dataset in datasets for subset in dataset.subsets)
    dataset_of_subset = tuple(number for number, dataset in enumerate(datasets) for _ in dataset.subsets)
    return Samples(
        subsets, dataset_of_subset, tuple(shapes), join_columns(columns, np.int32), join_columns(draws, np.int32)
    )


def unique_sizes(images: ScannedImages) -> tuple[list[tuple[Size, ...]], NDArray[np.int64]]:
    """Return (the distinct rows of sizes of an image and its references, the row of each image)."""
    image_N12 = images.sizes_N2[:, None]
    sizes_NK2 = image_N12 if images.references is None else np.hstack([image_N12, images.references.sizes_NR2])
    codes_NK = sizes_NK2[..., 0].astype(np.int64) << 32 | sizes_NK2[..., 1]
    # Without references, comparing codes as plain numbers is many times faster than comparing rows.
    axis = None if codes_NK.shape[1] == 1 else 0
    codes_M, row_N = np.unique(codes_NK, axis=axis, return_inverse=True)
    rows = codes_M.reshape(len(codes_M), -1).tolist()
    # A code of 0 is a missing reference.
    return [tuple((code >> 32, code & 0xFFFFFFFF) for code in row if code) for row in rows], row_N.reshape(-1)


def with_references(
    shapes: Sequence[Shape], sizes: Sequence[tuple[Size, ...]], subset: SubsetConfig, step: int
) -> list[Shape]:
    """Return the shapes extended by those of the references. Each row of `sizes` is the image's size, then its
    references'."""
    rules = ReferenceRules(subset.control_resolution, subset.control_no_resize, step)
    return [
        replace(shape, references=tuple(rules.shape(size, image_size, shape) for size in references))
        for shape, (image_size, *references) in zip(shapes, sizes, strict=True)
    ]


def resolve_fixed_shape(image: Size, target: Size, subset: SubsetConfig) -> Shape:
    """Return the shape of an image without buckets: scaled to just cover the target. With random_crop, larger images
    keep their size."""
    if subset.random_crop and image[0] >= target[0] and image[1] >= target[1]:
        # As in sd-scripts, such an image is not scaled.
        return Shape(target, image)
    return Shape(target, cover(image, target))


def draws_of_dataset(dataset: ScannedDataset) -> NDArray[np.int32]:
    """Return the number of draws of every image, subset by subset: its repeats, or for regularisation images the
    balanced number."""
    repeats = [(subset.config, subset.config.num_repeats, len(subset.images)) for subset in dataset.subsets]
    num_train_draws = sum(count * images for config, count, images in repeats if not config.is_reg)
    # Before the draws are laid out: 10^9 repeats would take all memory.
    check_draws(num_train_draws)
    reg_repeats = [n for config, count, images in repeats if config.is_reg for n in [count] * images]
    reg_draws = iter(regularisation_repeats(num_train_draws, reg_repeats))
    return join_columns(
        [
            np.array(list(islice(reg_draws, images)), dtype=np.int32)
            if config.is_reg
            else np.full(images, count, dtype=np.int32)
            for config, count, images in repeats
        ],
        np.int32,
    )


def check_draws(num_draws: int) -> None:
    """Raise UserError if an epoch has too many draws to be ordered. Warn if ordering them takes long."""
    if num_draws > MAX_DRAWS:
        raise about("num_repeats")(
            f": an epoch would have {num_draws} samples, more than {MAX_DRAWS}. Lower the repeats, and use "
            "--max_train_steps or --max_train_epochs for a longer training"
        )
    if num_draws > MANY_DRAWS:
        logger.warning("num_repeats: an epoch has %d samples; ordering them before it starts takes a while", num_draws)


def build_draws(samples: Samples, configs: Sequence[DatasetConfig], chosen: Container[int]) -> Draws:
    """Number the draws of the `chosen` datasets, and sort them into buckets ordered by dataset and size."""
    is_chosen = np.array([dataset in chosen for dataset in range(len(configs))], dtype=bool)
    dataset_N = samples.dataset_of_each()
    counts_N = np.where(is_chosen[dataset_N], samples.draws_N, 0)
    sample_of_draw = np.repeat(np.arange(len(samples), dtype=np.int32), counts_N)
    # Number the few occurring pairs of dataset and shape first, then the buckets.
    pairs, pair_N = np.unique(dataset_N.astype(np.int64) << 32 | samples.shape_N, return_inverse=True)
    keys = [(int(pair >> 32), samples.shapes[pair & 0xFFFFFFFF].sizes) for pair in pairs]
    index_of_bucket = {key: index for index, key in enumerate(sorted(set(keys)))}
    bucket_of_pair = np.array([index_of_bucket[key] for key in keys], dtype=np.int32)
    bucket_of_draw = np.repeat(bucket_of_pair[pair_N], counts_N) if len(pairs) else np.empty(0, dtype=np.int32)
    # A stable sort keeps the draws of a bucket in order, and the seeded shuffle of an epoch starts from this order.
    draws_by_bucket = np.split(
        np.argsort(bucket_of_draw, kind="stable").astype(np.int32), np.cumsum(np.bincount(bucket_of_draw))
    )
    # Not strict: np.split also returns the empty rest.
    buckets = tuple(
        Bucket(dataset, size, configs[dataset].batch_size, draws, tuple(references))
        for (dataset, (size, *references)), draws in zip(index_of_bucket, draws_by_bucket, strict=False)
        if len(draws)
    )
    return Draws(sample_of_draw, buckets)


def find_replacement(
    samples: Samples, subsets: Sequence[SubsetConfig], number: int, broken: AbstractSet[int], reason: str = ""
) -> int:
    """Return the index of the sample that replaces a damaged one: the next in its bucket, if possible from its own
    subset.

    Replacing it keeps the size of every batch and the length of the run. Raises UserError if no sample is left.
    """
    damaged = samples[number]
    fits = np.array([shape.sizes == damaged.shape.sizes for shape in samples.shapes])
    is_reg = np.array([subset.is_reg for subset in subsets])
    is_alike_N = (samples.draws_N > 0) & (samples.dataset_of_each() == damaged.dataset) & fits[samples.shape_N]
    # The loss of regularisation images has another weight, so only one of them replaces another.
    is_alike_N &= is_reg[samples.subset_of_each()] == is_reg[damaged.subset]
    is_alike_N[list(broken)] = False
    alike = np.flatnonzero(is_alike_N)
    if not len(alike):
        raise UserError(
            f"{reason or f'{damaged.image.key} is damaged'}; no other image of its size can replace it: "
            "repair or remove it"
        )
    alike = np.roll(alike, -int(np.searchsorted(alike, number)))
    same_subset = alike[samples.subset_of_each()[alike] == damaged.subset]
    return int(same_subset[0] if len(same_subset) else alike[0])


def find_duplicated_stems(datasets: Sequence[ScannedDataset]) -> Iterator[tuple[str, str]]:
    """Yield pairs of images of a subset that share their caption file and cache names, because only their extensions
    differ."""
    for dataset in datasets:
        for subset in dataset.subsets:
            if not may_share_stems(subset.images):
                continue
            key_by_stem: dict[str, str] = {}
            for key in subset.images.each_key():
                stem = os.path.splitext(key)[0]
                if stem in key_by_stem and key_by_stem[stem] != key:
                    yield key_by_stem[stem], key
                key_by_stem[stem] = key


def may_share_stems(images: ScannedImages) -> bool:
    """Return True if any two names may be equal apart from the extension. Only hashes are compared."""
    names = images.names if images.locations is None else images.each_key()
    # Equal hashes of different names only cost the full comparison.
    hashes_N = np.fromiter((hash(name.rpartition(".")[0]) for name in names), dtype=np.int64, count=len(images))
    hashes_N.sort()
    return bool((hashes_N[1:] == hashes_N[:-1]).any())


def check_size(image: ScannedImage, rgb: Pixels) -> None:
    """Raise UserError if the size of an image has changed since the start of the run."""
    size = (rgb.shape[1], rgb.shape[0])
    if size != image.size:
        raise of_file(image.key)(f"is {size[0]}x{size[1]}, but was {image.size} at the start", "restart the run")
