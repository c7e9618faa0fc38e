"""What is said about the data before any model is loaded."""

import itertools
import logging
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from library.data.description.buckets import BucketRules
from library.data.description.captions import fullest_captions, has_nested_wildcard
from library.data.plan.folder_audit import folder_lines
from library.data.plan.samples import Draws, Samples, duplicated_stems
from library.data.scanned.images import Pictures
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.errors import few
from library.formatting import format_count

MOST_COUNTED_AT_START = 2000  # captions; a fifth of a second of tokenizing
COUNTED_AT_ONCE = 16
MOST_ENLARGED = 1.5  # times its width and height, before the audit speaks of it
MOST_ALIKE = 8  # captions of a subset that may all be one
MOST_REMEMBERED = 4096  # captions whose tokens need not be counted again
SHORTEST_STEM = 4  # letters of a name that say something in a caption

Line = tuple[int, str]
"""(level of logging, text)"""


@dataclass(frozen=True)
class TokenLimit:
    """How captions are measured."""

    count: Callable[[str], int]
    max_tokens: int


def audit_lines(
    datasets: Sequence[ScannedDataset],
    rules: Sequence[BucketRules],
    samples: Samples,
    draws: Draws,
    limit: TokenLimit | None,
) -> Iterator[Line]:
    """The report, one line at a time."""
    num_subsets = sum(len(dataset.subsets) for dataset in datasets)
    subset_N = samples.subset_of_each()
    num_draws = np.bincount(subset_N, samples.draws_N, num_subsets).astype(int).tolist()
    unused = np.bincount(subset_N, samples.draws_N == 0, num_subsets).astype(int).tolist()
    first_subset = 0
    for number, (dataset, rule) in enumerate(zip(datasets, rules, strict=True)):
        yield logging.INFO, f"dataset {number + 1}: {describe_size(rule)}, batch size {dataset.config.batch_size}"
        for index, subset in enumerate(dataset.subsets, first_subset):
            yield from subset_lines(subset, num_draws[index], unused[index])
            yield from folder_lines(subset)
        first_subset += len(dataset.subsets)
        for bucket in draws.buckets:
            if bucket.dataset == number:
                size = f"{bucket.size[0]}x{bucket.size[1]}"
                yield logging.INFO, f"  bucket {size}: {len(bucket.draws)} draws, {bucket.num_batches} batches"
        yield from enlarged_lines(samples, number)
        if not rule.enable_bucket:
            yield from cut_lines(dataset, rule)
    yield from pair_lines(datasets)
    if limit is not None:
        yield from length_lines(datasets, limit)


def describe_size(rule: BucketRules) -> str:
    """The sizes a dataset trains at."""
    size = f"{rule.resolution[0]}x{rule.resolution[1]}"
    if not rule.enable_bucket:
        return f"{size} without buckets"
    if rule.no_upscale:
        return f"area of {size} in buckets of {rule.step}, nothing enlarged"
    return f"area of {size} in buckets of {rule.min_reso} to {rule.max_reso} by {rule.step}"


def subset_lines(subset: ScannedSubset, num_draws: int, num_unused: int) -> Iterator[Line]:
    """Counts of one subset, and what is missing in it."""
    config, source = subset.config, f"  {subset.config.source}:"
    kind = "regularisation pictures" if config.is_reg else "pictures"
    counts = f"{len(subset.pictures)} {kind} x {config.num_repeats} repeats, {num_draws} draws per epoch"
    yield logging.INFO, f"{source} {counts}"
    if num_unused:
        yield logging.WARNING, f"{source} {num_unused} {kind} are more than needed and unused"
    if subset.dropped:
        reasons = few([f"{path} {reason}" for path, reason in subset.dropped])
        yield logging.WARNING, f"{source} {len(subset.dropped)} pictures are left out: {reasons}"
    if subset.small:
        what = f"{len(subset.small)} {kind} are left out by skip_image_resolution"
        yield logging.INFO, f"{source} {what}: {few(subset.small)}"
    if subset.without_caption:
        level = logging.INFO if config.class_tokens else logging.WARNING
        stand_in = f"using '{config.class_tokens}'" if config.class_tokens else "trained with an empty prompt"
        missing = subset.without_caption
        yield (
            level,
            f"{source} {format_count(len(missing), 'image')} without a caption file, {stand_in}: {few(missing)}",
        )
    if subset.empty_caption:
        empty = subset.empty_caption
        yield logging.WARNING, f"{source} {format_count(len(empty), 'empty caption')}: {few(empty)}"
    yield from wording_lines(subset, source)
    if config.captions.enable_wildcard:
        is_nested = np.fromiter(map(has_nested_wildcard, subset.pictures.captions), dtype=bool)
        effect = "captions have braces inside braces, of which only the inner ones are alternatives"
        yield from told(subset.pictures, is_nested, f"{source} {{}} {effect}")


def told(pictures: Pictures, is_meant: NDArray[np.bool_], text: str) -> Iterator[Line]:
    """A warning with the number of the pictures that are meant, and the first few of them; nothing where none is."""
    rows = np.flatnonzero(is_meant)
    if len(rows):
        yield logging.WARNING, f"{text.format(len(rows))}: {few(pictures.keys_at(rows[:5]), count=len(rows))}"


def wording_lines(subset: ScannedSubset, source: str) -> Iterator[Line]:
    """Captions that teach nothing: one for all pictures, or with the name of the file in it."""
    without, pictures = set(subset.without_caption), subset.pictures
    has_own = pictures.captions.lengths > 0
    if without:
        has_own &= ~np.fromiter((key in without for key in pictures.each_key()), dtype=bool, count=len(pictures))
    num_own = int(has_own.sum())
    if num_own > MOST_ALIKE:
        own = compress(pictures.captions, has_own)
        first = next(own)
        if all(caption == first for caption in own):
            effect = "so no word is learned for what differs between the pictures"
            yield logging.WARNING, f"{source} all {num_own} captions are the same, {effect}: {first[:80]!r}"
    is_named = np.zeros(len(pictures), dtype=bool)
    is_named[[*captions_with_names(pictures)]] = True
    yield from told(pictures, is_named & has_own, f"{source} captions that contain their own file name: {{}}")


def captions_with_names(pictures: Pictures) -> Iterator[int]:
    """The rows whose caption holds the picture's name, other than a word that people would write."""
    names = pictures.names.lowered()
    files = map(os.path.basename, names) if pictures.prefix == "" else iter(names)
    for row, (name, caption) in enumerate(zip(files, pictures.captions.lowered(), strict=True)):
        stem = name.rpartition(".")[0]
        if stem in caption and len(stem) >= SHORTEST_STEM and any(sign.isdigit() or sign == "_" for sign in stem):
            yield row


def enlarged_lines(samples: Samples, dataset: int) -> Iterator[Line]:
    """Pictures that are much smaller than what is trained: they teach blur."""
    own = samples.own(dataset)
    resized_M = np.array([shape.resized[0] for shape in samples.shapes])
    widths_N = samples.sizes()[own, 0]
    rows = np.flatnonzero(resized_M[samples.shape_N[own]] > MOST_ENLARGED * widths_N) + own.start
    if len(rows):
        sizes = [f"{width}x{height}" for width, height in samples.sizes()[rows[:5]].tolist()]
        keys = samples.keys_at(rows[:5])
        shown = few([f"{key} ({size})" for key, size in zip(keys, sizes, strict=True)], count=len(rows))
        effect = f"upscaled more than {MOST_ENLARGED}x; the LoRA may learn blur"
        yield logging.WARNING, f"  {format_count(len(rows), 'image')} {effect}: {shown}"


def cut_lines(dataset: ScannedDataset, rule: BucketRules) -> Iterator[Line]:
    """Without buckets, pictures of another size are cut, which may not be meant."""
    counts = [(subset.pictures.sizes_N2 != rule.resolution).any(axis=1) for subset in dataset.subsets]
    count = int(sum(is_other.sum() for is_other in counts))
    if count:
        first: list[str] = []
        for subset, is_other in zip(dataset.subsets, counts, strict=True):
            first += subset.pictures.keys_at(np.flatnonzero(is_other)[:5])
        size = f"{rule.resolution[0]}x{rule.resolution[1]}"
        effect = f"are not {size} and are scaled or cut to it, as enable_bucket is off"
        yield logging.WARNING, f"  {count} pictures {effect}: {few(first, count=count)}"


def pair_lines(datasets: Sequence[ScannedDataset]) -> Iterator[Line]:
    """Pictures that share a caption file because only their endings differ."""
    pairs = [f"{first} and {second}" for first, second in duplicated_stems(datasets)]
    if pairs:
        yield logging.WARNING, f"{len(pairs)} pictures share their caption with one of the same name: {few(pairs)}"


def log_lengths_later(datasets: Sequence[ScannedDataset], limit: TokenLimit, log: logging.Logger) -> None:
    """Count the tokens of very many captions beside the run, which goes on; what is too long is logged in the end."""

    def count(caption: str) -> int:
        # Others get most of the interpreter's time: without it, loading models would take turns of 5 ms with this.
        if next(counted) % COUNTED_AT_ONCE == 0:
            time.sleep(0.004)
        return limit.count(caption)

    def work() -> None:
        for level, line in length_lines(datasets, TokenLimit(count, limit.max_tokens)):
            log.log(level, "%s", line)

    counted = itertools.count()
    log.info("captions beyond the %d tokens that reach the model are looked for meanwhile", limit.max_tokens)
    threading.Thread(target=work, name="count tokens", daemon=True).start()


def length_lines(datasets: Sequence[ScannedDataset], limit: TokenLimit) -> Iterator[Line]:
    """Captions of which the end does not reach the model. Memory does not grow with the number of pictures."""
    known: dict[str, int] = {}
    shown: dict[str, int] = {}  # the first few
    hashes = array("q")  # of the keys of all, for a picture may stand in several datasets
    for dataset in datasets:
        for subset in dataset.subsets:
            pictures = subset.pictures
            for row, text in enumerate(pictures.captions):
                for caption in fullest_captions(text, subset.config.captions):
                    if len(caption.encode()) < limit.max_tokens:
                        continue  # a token is at least one byte, but for one that marks the start
                    if caption not in known:
                        if len(known) >= MOST_REMEMBERED:
                            known.clear()
                        known[caption] = limit.count(caption)
                    if known[caption] > limit.max_tokens:
                        key = pictures[row].key
                        hashes.append(hash(key))
                        if key in shown or len(shown) < 5:
                            shown[key] = max(known[caption], shown.get(key, 0))
    if hashes:
        examples = [f"{key} ({count})" for key, count in shown.items()]
        count = len(np.unique(np.frombuffer(hashes, dtype=np.int64)))
        yield (
            logging.WARNING,
            (
                f"{count} captions are longer than the {limit.max_tokens} tokens that reach the model, "
                f"their ends are cut: {few(examples, count=count)}"
            ),
        )
