"""Checks of the reference images, and their part of the audit, before anything is encoded."""

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from library.base.errors import about, list_few, of_file
from library.base.formatting import format_count
from library.data.decoding.images import has_alpha, open_image
from library.data.decoding.threads import read_many
from library.data.description.schema import SubsetConfig
from library.data.plan.folder_audit import MOST_COMPARED, Line
from library.data.plan.pair_checks import NUM_THREADS, check_differences, is_same_file
from library.data.plan.samples import Samples
from library.data.scanned.images import ScannedImage, ScannedImages
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.storage.storage import Storage, is_remote
from library.protocols import LatentSpec

RATIO_TOLERANCE = 0.02  # relative difference of aspect ratios; resizing a copy rounds by less
KEEP_WHOLE = "; set control_resolution to keep it whole"


def check_references(subsets: Sequence[SubsetConfig], samples: Samples, spec: LatentSpec) -> None:
    """Raise UserError for too many or no references, as the base model needs, for crops that references cannot follow,
    and for pairs of equal images."""
    if spec.needs_references and all(images.references is None for images in samples.subsets):
        raise about("--edit")(
            "trains on reference images, but no subset of the data set has any",
            "name them (control_dirs, control_directory or control_path), or remove --edit",
        )
    ends = samples.ends
    for subset, images, end in zip(subsets, samples.subsets, ends, strict=True):
        if images.references is None:
            continue
        if subset.opposite_dir:
            check_differences(subset.opposite_dir, images)
        count = len(images.references.paths)
        if not subset.opposite_dir and count > spec.max_references:
            limit = f"takes at most {spec.max_references}" if spec.max_references else "takes none"
            raise of_file(subset.source)(
                f"has {format_count(count, 'reference image')} for each image (control_dirs, control_directory or "
                f"control_path), but this base model {limit}",
                "remove them, or train an edit model",
            )
        for name in ("random_crop", "face_crop_aug_range"):
            if getattr(subset, name):
                check_crops(name, subset, samples, range(end - len(images), end))


def check_crops(name: str, subset: SubsetConfig, samples: Samples, numbers: range) -> None:
    """Raise UserError for references that cannot be cropped like their image."""
    is_other_M = [
        any((reference.bucket, reference.resized) != (shape.bucket, shape.resized) for reference in shape.references)
        for shape in samples.shapes
    ]
    mismatched = [number for number in numbers if is_other_M[samples.shape_N[number]]]
    if mismatched:
        raise of_file(subset.source)(
            f": {name} crops images where reference images of another size cannot follow: "
            f"{list_few(samples.keys_at(np.array(mismatched[:3])), count=len(mismatched))}",
            f"remove {name}, control_resolution and control_no_resize, or give the references the sizes of their "
            "images",
        )


def reference_lines(subset: ScannedSubset, storage: Storage, has_alpha: bool) -> Iterator[Line]:
    """Yield a line about the reference images of a subset, and one for each kind of problem. `has_alpha` tells that
    the base model encodes alpha channels."""
    config, references = subset.config, subset.images.references
    source = f"  {config.source}:"
    if references is None:
        for name in ("control_resolution", "control_no_resize"):
            if getattr(config, name):
                yield logging.WARNING, f"{source} {name} has no effect: the subset has no reference images"
        return
    counts = sorted({len(row) for row in references})
    count = format_count(counts[-1], "reference image")
    description = f"{counts[0]} to {count}" if counts[0] < counts[-1] else count
    if config.opposite_dir:
        description = f"one partner in {config.opposite_dir}"
    yield logging.INFO, f"{source} {description} for each image, {describe_sizes(config)}"
    if subset.surplus:
        effect = "without an image of its name, not used"
        yield (
            logging.WARNING,
            f"{source} {format_count(len(subset.surplus), 'reference image')} {effect}: "
            + list_few([os.path.basename(path) for path in subset.surplus]),
        )
    if config.control_resolution is None and not config.control_no_resize:
        yield from ratio_lines(subset.images, source, "" if config.opposite_dir else KEEP_WHOLE)
    if len(subset.images) <= MOST_COMPARED:
        yield from content_lines(subset.images, source, storage, has_alpha)


def describe_sizes(config: SubsetConfig) -> str:
    """Describe how the references of a subset are resized."""
    area = "" if config.control_resolution is None else "{}x{}".format(*config.control_resolution)
    if config.control_no_resize:
        return f"not resized unless larger than {area}" if area else "not resized"
    return f"resized to the area of {area}" if area else "resized to the size of their image"


def ratio_lines(images: ScannedImages, source: str, advice: str) -> Iterator[Line]:
    """Yield a warning about references that are cropped, because they do not have the aspect ratio of their image."""
    assert images.references is not None
    sizes_NR2 = images.references.sizes_NR2
    ratios_NR = sizes_NR2[..., 0] / np.maximum(sizes_NR2[..., 1], 1)
    ratios_N1 = images.sizes_N2[:, :1] / images.sizes_N2[:, 1:]
    is_other_NR = (np.abs(ratios_NR / ratios_N1 - 1) > RATIO_TOLERANCE) & (sizes_NR2[..., 0] > 0)
    rows = np.flatnonzero(is_other_NR.any(axis=1))
    if len(rows):
        examples = list_few([os.path.basename(key) for key in images.keys_at(rows[:3])], 3, len(rows))
        yield (
            logging.WARNING,
            (
                f"{source} {format_count(len(rows), 'image')} with a reference image of another aspect ratio, which is "
                f"cropped to theirs{advice}: {examples}"
            ),
        )


def content_lines(images: ScannedImages, source: str, storage: Storage, has_alpha: bool) -> Iterator[Line]:
    """Yield warnings about references that equal their image and, unless `has_alpha`, about references with
    transparency. Images at URLs are not fetched to find these."""
    pairs = [(image, reference) for image in images for reference in image.references]

    checks = read_many(lambda pair: (is_same_file(*pair), is_transparent(pair[1], storage)), pairs, NUM_THREADS)
    same = [os.path.basename(image.key) for (image, _), (is_same, _) in zip(pairs, checks, strict=True) if is_same]
    if same:
        effect = "equal to its reference image, which teaches the model to change nothing"
        yield logging.WARNING, f"{source} {format_count(len(same), 'image')} {effect}: {list_few(same)}"
    transparent = [
        os.path.basename(reference.key) for (_, reference), (_, is_alpha) in zip(pairs, checks, strict=True) if is_alpha
    ]
    if transparent and not has_alpha:
        effect = "with an alpha channel, which is dropped: transparent parts show the colours stored under them"
        yield (
            logging.WARNING,
            f"{source} {format_count(len(transparent), 'reference image')} {effect}: {list_few(transparent)}",
        )


def is_transparent(image: ScannedImage, storage: Storage) -> bool:
    """Return True if an image's header declares an alpha channel or transparent colour; False for images at URLs."""
    if is_remote(image.key):
        return False
    with open_image(image.key, storage.content(image)) as file:
        return has_alpha(file)
