"""The audit of the data, logged before any model is loaded."""

import itertools
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, islice

import numpy as np
from numpy.typing import NDArray

from library.base.errors import list_few
from library.base.formatting import format_count
from library.data.decoding.images import parse_face
from library.data.description.buckets import BucketRules, Size
from library.data.description.captions import (
    CaptionRules,
    find_idle_rules,
    has_nested_wildcard,
    iterate_fullest_captions,
)
from library.data.plan.folder_audit import Line, folder_lines
from library.data.plan.references import is_transparent, reference_lines
from library.data.plan.samples import Draws, Samples, find_duplicated_stems
from library.data.scanned.columns import Texts
from library.data.scanned.images import ScannedImages
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.data.sources.storage.storage import Storage

MOST_COUNTED_AT_START = 2000  # captions; tokenizing this many takes 0.2 s
COUNTED_AT_ONCE = 16
MOST_ENLARGED = 1.5  # upscaling factor above which the audit warns
MOST_OPENED = 100  # images whose headers are searched for an alpha channel
MOST_ALIKE = 8  # equal captions in a subset above which the audit warns
MOST_SHOWN = 3  # images listed in a line
MOST_REMEMBERED = 4096  # captions whose token counts are remembered
SHORTEST_STEM = 4  # letters; shorter file names are not searched for in captions


@dataclass(frozen=True)
class TokenLimit:
    """The base model's token counter and its limit."""

    count: Callable[[str], int]
    max_tokens: int


def audit_lines(
    datasets: Sequence[ScannedDataset],
    rules: Sequence[BucketRules],
    samples: Samples,
    draws: Draws,
    limit: TokenLimit | None,
    storage: Storage,
    has_alpha: bool = False,
) -> Iterator[Line]:
    """Yield the lines of the audit. `has_alpha` tells that the base model encodes alpha channels."""
    num_subsets = sum(len(dataset.subsets) for dataset in datasets)
    subset_N = samples.subset_of_each()
    num_draws = np.bincount(subset_N, samples.draws_N, num_subsets).astype(int).tolist()
    unused = np.bincount(subset_N, samples.draws_N == 0, num_subsets).astype(int).tolist()
    first_subset = 0
    # Datasets of several sizes share their folders, and each warning about a folder is shown once.
    warned: set[str] = set()
    for number, (dataset, rule) in enumerate(zip(datasets, rules, strict=True)):
        yield logging.INFO, f"dataset {number + 1}: {describe_size(rule)}, batch size {dataset.config.batch_size}"
        for index, subset in enumerate(dataset.subsets, first_subset):
            own_lines = chain(subset_lines(subset, num_draws[index], unused[index]), mask_lines(subset, storage))
            for level, text in chain(own_lines, folder_lines(subset), reference_lines(subset, storage, has_alpha)):
                if level == logging.INFO or text not in warned:
                    yield level, text
                    warned.add(text)
        first_subset += len(dataset.subsets)
        for bucket in draws.buckets:
            if bucket.dataset == number:
                size = " with references of ".join(
                    filter(None, [format_sizes([bucket.size]), format_sizes(bucket.reference_sizes)])
                )
                yield logging.INFO, f"  bucket {size}: {len(bucket.draws)} draws, {bucket.num_batches} batches"
        yield from warn_enlarged(samples, number)
        if not rule.enable_bucket:
            yield from cropping_lines(dataset, rule)
    yield from idle_lines(datasets)
    yield from pair_lines(datasets)
    if limit is not None:
        yield from length_lines(datasets, limit)


def format_sizes(sizes: Sequence[Size]) -> str:
    """Format sizes as `512x768, 640x640`."""
    return ", ".join(f"{width}x{height}" for width, height in sizes)


def describe_size(rule: BucketRules) -> str:
    size = f"{rule.resolution[0]}x{rule.resolution[1]}"
    if not rule.enable_bucket:
        return f"{size} without buckets"
    if rule.no_upscale:
        return f"area of {size} in buckets of {rule.step}, without upscaling"
    return f"area of {size} in buckets of {rule.min_reso} to {rule.max_reso} by {rule.step}"


def subset_lines(subset: ScannedSubset, num_draws: int, num_unused: int) -> Iterator[Line]:
    """Yield the counts of a subset, and warnings about its images and captions."""
    config, source = subset.config, f"  {subset.config.source}:"
    kind = "regularisation images" if config.is_reg else "images"
    counts = f"{len(subset.images)} {kind} x {config.num_repeats} repeats, {num_draws} draws per epoch"
    yield logging.INFO, f"{source} {counts}"
    if num_unused:
        yield logging.WARNING, f"{source} {num_unused} {kind} are not needed and unused"
    if config.face_crop_aug_range is not None and not any(map(parse_face, subset.images.each_key())):
        yield logging.WARNING, f"{source} face_crop_aug_range has no effect: no file name ends in a face's _cx_cy_w_h"
    yield from file_lines(subset, kind, "trained")
    yield from wording_lines(subset, source)
    if config.captions.enable_wildcard:
        is_nested = np.fromiter(map(has_nested_wildcard, subset.images.captions), dtype=bool)
        effect = "captions have nested braces, of which only the inner ones are alternatives"
        yield from warn_about(subset, is_nested, f"{source} {{}} {effect}")


def mask_lines(subset: ScannedSubset, storage: Storage) -> Iterator[Line]:
    """Yield a warning if alpha_mask is set and none of the first images has an alpha channel."""
    config = subset.config
    first = list(islice(subset.images, MOST_OPENED)) if config.alpha_mask else []
    if first and not any(is_transparent(image, storage) for image in first):
        of_many = "" if len(first) == len(subset.images) else f" of the first {len(first)}"
        effect = f"alpha_mask has no effect: no image{of_many} has an alpha channel"
        yield logging.WARNING, f"  {config.source}: {effect}"


def idle_lines(datasets: Sequence[ScannedDataset]) -> Iterator[Line]:
    """Yield a warning for each key of captions that changes none of the captions for which it is set."""
    texts_of: dict[CaptionRules, list[Texts]] = {}
    for subset in chain.from_iterable(dataset.subsets for dataset in datasets):
        if not subset.config.is_reg and subset.config.captions.fixed is None:
            texts_of.setdefault(subset.config.captions, []).append(subset.images.captions)
    for rules, columns in texts_of.items():
        for text in find_idle_rules(rules, partial(is_in_any, columns)):
            yield logging.WARNING, f"  {text}"


def is_in_any(columns: Sequence[Texts], text: str) -> bool:
    return any(column.contain(text) for column in columns)


def held_out_lines(trained: Sequence[ScannedDataset], held_out: Sequence[ScannedDataset]) -> Iterator[Line]:
    """Yield lines about the files of sources of which no image is trained; the other ones have theirs already."""
    sources = {subset.config.source for dataset in trained for subset in dataset.subsets}
    for subset in (subset for dataset in held_out for subset in dataset.subsets):
        if subset.config.source not in sources:
            yield from file_lines(subset, "images", "measured")
            yield from folder_lines(subset, are_trained=False)
            sources.add(subset.config.source)


def file_lines(subset: ScannedSubset, kind: str, use: str) -> Iterator[Line]:
    """Yield lines about skipped images and missing captions. `kind` names the images, `use` what happens to them."""
    config, source = subset.config, f"  {subset.config.source}:"
    if subset.dropped:
        reasons = list_few([f"{shorten_path(path, config.source)} {reason}" for path, reason in subset.dropped])
        yield logging.WARNING, f"{source} {format_count(len(subset.dropped), 'image')} skipped: {reasons}"
    if subset.small:
        text = f"{len(subset.small)} {kind} are skipped by skip_image_resolution"
        yield logging.INFO, f"{source} {text}: {list_few_paths(subset.small, config.source)}"
    if subset.without_caption:
        level = logging.INFO if config.class_tokens else logging.WARNING
        effect = f"using '{config.class_tokens}'" if config.class_tokens else f"{use} with an empty prompt"
        missing = subset.without_caption
        yield (
            level,
            f"{source} {format_count(len(missing), 'image')} without a caption file, {effect}: "
            f"{list_few_paths(missing, config.source)}",
        )
    if subset.empty_caption:
        empty = subset.empty_caption
        examples = list_few_paths(empty, config.source)
        yield logging.WARNING, f"{source} {format_count(len(empty), 'empty caption')}: {examples}"


def warn_about(subset: ScannedSubset, is_affected: NDArray[np.bool_], text: str) -> Iterator[Line]:
    """Yield a warning with the number of affected images and the first few of them. `is_affected` selects the images;
    `{}` in `text` stands for their number."""
    rows = np.flatnonzero(is_affected)
    if len(rows):
        examples = list_few_paths(subset.images.keys_at(rows[:MOST_SHOWN]), subset.config.source, len(rows))
        yield logging.WARNING, f"{text.format(len(rows))}: {examples}"


def shorten_path(path: str, folder: str) -> str:
    """Return a path relative to `folder`, which the line has already named; unchanged if it is elsewhere."""
    inside = path.removeprefix(folder)
    return path if inside == path else inside.lstrip("/\\")


def list_few_paths(paths: Sequence[str], folder: str, count: int | None = None) -> str:
    """List the first paths relative to `folder`, which the line has already named. `count` is the total if `paths`
    is incomplete."""
    total = len(paths) if count is None else count
    return list_few([shorten_path(path, folder) for path in paths[:MOST_SHOWN]], MOST_SHOWN, total)


def wording_lines(subset: ScannedSubset, source: str) -> Iterator[Line]:
    """Yield warnings about captions that teach little: equal for all images, or containing the file name."""
    without, images = set(subset.without_caption), subset.images
    has_own = images.captions.lengths > 0
    if without:
        has_own &= ~np.fromiter((key in without for key in images.each_key()), dtype=bool, count=len(images))
    num_own = int(has_own.sum())
    # One instruction may be meant for all pairs.
    if num_own > MOST_ALIKE and images.references is None:
        own_captions = compress(images.captions, has_own)
        first = next(own_captions)
        if all(caption == first for caption in own_captions):
            effect = "so no word is learned for what differs between the images"
            yield logging.WARNING, f"{source} all {num_own} captions are the same, {effect}: {first[:80]!r}"
    is_named = np.zeros(len(images), dtype=bool)
    is_named[[*captions_with_names(images)]] = True
    yield from warn_about(subset, is_named & has_own, f"{source} captions that contain their own file name: {{}}")


def captions_with_names(images: ScannedImages) -> Iterator[int]:
    """Yield the rows whose caption contains the image's file name. Names without a digit or underscore may be
    ordinary words and are skipped."""
    names = images.names.lowered()
    files = map(os.path.basename, names) if images.prefix == "" else iter(names)
    for row, (name, caption) in enumerate(zip(files, images.captions.lowered(), strict=True)):
        stem = name.rpartition(".")[0]
        if stem in caption and len(stem) >= SHORTEST_STEM and any(sign.isdigit() or sign == "_" for sign in stem):
            yield row


def warn_enlarged(samples: Samples, dataset: int) -> Iterator[Line]:
    """Yield a warning about images much smaller than the training size, which teach blur."""
    dataset_rows = samples.slice_of(dataset)
    resized_M = np.array([shape.resized[0] for shape in samples.shapes])
    widths_N = samples.sizes()[dataset_rows, 0]
    rows = np.flatnonzero(resized_M[samples.shape_N[dataset_rows]] > MOST_ENLARGED * widths_N) + dataset_rows.start
    if len(rows):
        sizes = [f"{width}x{height}" for width, height in samples.sizes()[rows[:MOST_SHOWN]].tolist()]
        keys = map(os.path.basename, samples.keys_at(rows[:MOST_SHOWN]))
        examples = list_few([f"{key} ({size})" for key, size in zip(keys, sizes, strict=True)], MOST_SHOWN, len(rows))
        effect = f"upscaled more than {MOST_ENLARGED}x; the LoRA may learn blur"
        yield logging.WARNING, f"  {format_count(len(rows), 'image')} {effect}: {examples}"


def cropping_lines(dataset: ScannedDataset, rule: BucketRules) -> Iterator[Line]:
    """Yield a warning about images that are scaled or cropped because buckets are disabled."""
    is_other_by_subset = [(subset.images.sizes_N2 != rule.resolution).any(axis=1) for subset in dataset.subsets]
    count = int(sum(is_other.sum() for is_other in is_other_by_subset))
    if count:
        names: list[str] = []
        for subset, is_other in zip(dataset.subsets, is_other_by_subset, strict=True):
            names += map(os.path.basename, subset.images.keys_at(np.flatnonzero(is_other)[:MOST_SHOWN]))
        size = f"{rule.resolution[0]}x{rule.resolution[1]}"
        effect = f"not of {size}, scaled or cropped to it because enable_bucket is off"
        yield logging.WARNING, f"  {format_count(count, 'image')} {effect}: {list_few(names, MOST_SHOWN, count)}"


def pair_lines(datasets: Sequence[ScannedDataset]) -> Iterator[Line]:
    """Yield a warning about images that share a caption file, because their names differ only in the extension."""
    pairs = [f"{first} and {second}" for first, second in find_duplicated_stems(datasets)]
    if pairs:
        yield (
            logging.WARNING,
            f"{format_count(len(pairs), 'image')} with the caption file of another: {list_few(pairs)}",
        )


def log_lengths_later(datasets: Sequence[ScannedDataset], limit: TokenLimit, log: logging.Logger) -> None:
    """Count the tokens of the captions in a background thread, and log overlong captions at its end."""

    def count(caption: str) -> int:
        # Yield the interpreter to other threads. Otherwise this thread would take it every 5 ms and slow down the
        # loading of models.
        if next(counted) % COUNTED_AT_ONCE == 0:
            time.sleep(0.004)
        return limit.count(caption)

    def work() -> None:
        for level, line in length_lines(datasets, TokenLimit(count, limit.max_tokens)):
            log.log(level, "%s", line)

    counted = itertools.count()
    log.info("searching for captions longer than the model's %d tokens in the background", limit.max_tokens)
    # A daemon, so that the end of the run does not wait for the count.
    threading.Thread(target=work, name="count tokens", daemon=True).start()


def length_lines(datasets: Sequence[ScannedDataset], limit: TokenLimit) -> Iterator[Line]:
    """Yield a warning about captions that are truncated. Memory does not grow with the number of images."""
    num_tokens: dict[str, int] = {}
    count_by_key: dict[str, int] = {}  # token counts of the first few, by key
    hashes = array("q")  # of the affected keys, because an image may be in several datasets
    for dataset in datasets:
        for subset in dataset.subsets:
            images = subset.images
            for row, text in enumerate(images.captions):
                for caption in iterate_fullest_captions(text, subset.config.captions):
                    if len(caption.encode()) < limit.max_tokens:
                        continue  # a token has at least one byte, except the begin token
                    if caption not in num_tokens:
                        if len(num_tokens) >= MOST_REMEMBERED:
                            num_tokens.clear()
                        num_tokens[caption] = limit.count(caption)
                    if num_tokens[caption] > limit.max_tokens:
                        key = images[row].key
                        hashes.append(hash(key))
                        if key in count_by_key or len(count_by_key) < 5:
                            count_by_key[key] = max(num_tokens[caption], count_by_key.get(key, 0))
    if hashes:
        examples = [f"{key} ({count})" for key, count in count_by_key.items()]
        count = len(np.unique(np.frombuffer(hashes, dtype=np.int64)))
        yield (
            logging.WARNING,
            (
                f"{format_count(count, 'caption')} longer than the model's {limit.max_tokens} tokens, truncated: "
                f"{list_few(examples, count=count)}"
            ),
        )
