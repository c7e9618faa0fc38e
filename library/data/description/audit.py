"""What is said about the data before any model is loaded."""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from library.data.description.buckets import BucketRules
from library.data.description.captions import fullest_captions, has_nested_wildcard
from library.data.description.folder_audit import folder_lines
from library.data.sources.samples import Draws, Sample, duplicated_stems
from library.data.sources.scan import Picture, ScannedDataset, ScannedSubset, few

MOST_COUNTED_AT_START = 2000  # captions; a fifth of a second of tokenizing
COUNTED_AT_ONCE = 16
MOST_ENLARGED = 1.5  # times its width and height, before the audit speaks of it
MOST_ALIKE = 8  # captions of a subset that may all be one
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
    samples: Sequence[Sample],
    draws: Draws,
    limit: TokenLimit | None,
) -> Iterator[Line]:
    """The report, one line at a time."""
    num_subsets = sum(len(dataset.subsets) for dataset in datasets)
    subset_of_sample = np.array([sample.subset for sample in samples], dtype=np.int64)
    draws_of_sample = np.array([sample.num_draws for sample in samples], dtype=np.int64)
    num_draws = np.bincount(subset_of_sample, draws_of_sample, num_subsets).astype(int).tolist()
    unused = np.bincount(subset_of_sample, draws_of_sample == 0, num_subsets).astype(int).tolist()
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
        own = [sample for sample in samples if sample.dataset == number]
        yield from enlarged_lines(own)
        if not rule.enable_bucket:
            yield from cut_lines(own, rule)
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
        stand_in = f"'{config.class_tokens}' stands in" if config.class_tokens else "they are empty"
        missing = subset.without_caption
        yield level, f"{source} {len(missing)} captions are missing, {stand_in}: {few(missing)}"
    if subset.empty_caption:
        empty = subset.empty_caption
        yield logging.WARNING, f"{source} {len(empty)} captions are empty: {few(empty)}"
    yield from wording_lines(subset, source)
    if config.captions.enable_wildcard:
        nested = [picture.path for picture in subset.pictures if has_nested_wildcard(picture.caption)]
        if nested:
            effect = "have braces inside braces, of which only the inner ones are alternatives"
            yield logging.WARNING, f"{source} {len(nested)} captions {effect}: {few(nested)}"


def wording_lines(subset: ScannedSubset, source: str) -> Iterator[Line]:
    """Captions that teach nothing: one for all pictures, or with the name of the file in it."""
    without = set(subset.without_caption)
    own = [picture for picture in subset.pictures if picture.caption and picture.path not in without]
    if len(own) > MOST_ALIKE and len({picture.caption for picture in own}) == 1:
        effect = "so no word is learned for what differs between the pictures"
        yield logging.WARNING, f"{source} all {len(own)} captions are the same, {effect}: {own[0].caption[:80]!r}"
    named = [picture.path for picture in own if is_named(picture)]
    if named:
        yield logging.WARNING, f"{source} {len(named)} captions contain the name of their file: {few(named)}"


def is_named(picture: Picture) -> bool:
    """Whether the caption holds the file's name, other than a word that people would write."""
    stem = os.path.splitext(os.path.basename(picture.path))[0]
    is_made_up = any(letter.isdigit() or letter == "_" for letter in stem)
    return len(stem) >= SHORTEST_STEM and is_made_up and stem.lower() in picture.caption.lower()


def enlarged_lines(samples: Sequence[Sample]) -> Iterator[Line]:
    """Pictures that are much smaller than what is trained: they teach blur."""
    small = [
        f"{sample.picture.path} ({sample.picture.size[0]}x{sample.picture.size[1]})"
        for sample in samples
        if sample.shape.resized[0] > MOST_ENLARGED * sample.picture.size[0]
    ]
    if small:
        effect = f"are enlarged more than {MOST_ENLARGED} times, which teaches blur"
        yield logging.WARNING, f"  {len(small)} pictures {effect}: {few(small)}"


def cut_lines(samples: Sequence[Sample], rule: BucketRules) -> Iterator[Line]:
    """Without buckets, pictures of another size are cut, which may not be meant."""
    other = [sample.picture.path for sample in samples if sample.picture.size != rule.resolution]
    if other:
        size = f"{rule.resolution[0]}x{rule.resolution[1]}"
        effect = f"are not {size} and are scaled or cut to it, as enable_bucket is off"
        yield logging.WARNING, f"  {len(other)} pictures {effect}: {few(other)}"


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
    """Captions of which the end does not reach the model."""
    known: dict[str, int] = {}
    too_long: dict[str, int] = {}
    for dataset in datasets:
        for subset in dataset.subsets:
            for picture in subset.pictures:
                for caption in fullest_captions(picture.caption, subset.config.captions):
                    if len(caption.encode()) < limit.max_tokens:
                        continue  # a token is at least one byte, but for one that marks the start
                    if caption not in known:
                        known[caption] = limit.count(caption)
                    if known[caption] > limit.max_tokens:
                        too_long[picture.path] = max(known[caption], too_long.get(picture.path, 0))
    if too_long:
        examples = few([f"{path} ({count})" for path, count in too_long.items()])
        yield (
            logging.WARNING,
            (
                f"{len(too_long)} captions are longer than the {limit.max_tokens} tokens that reach the model, "
                f"their ends are cut: {examples}"
            ),
        )
