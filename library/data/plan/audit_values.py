"""The results of the audit as plain values for programs; audit.py formats them for people."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from library.data.description.buckets import BucketRules
from library.data.plan.audit import MOST_COUNTED_AT_START, TokenLimit
from library.data.plan.dataset_metadata import TagFrequency
from library.data.plan.samples import Draws
from library.data.scanned.columns import Texts
from library.data.scanned.subsets import ScannedDataset, ScannedSubset

MOST_NAMED = 100  # skipped images that are listed
MOST_TAGS = 50


def collect_values(
    datasets: Sequence[ScannedDataset],
    rules: Sequence[BucketRules],
    draws: Draws,
    frequencies: Sequence[TagFrequency],
    limit: TokenLimit | None,
) -> dict[str, Any]:
    """Return datasets with subsets and buckets, skipped images, caption lengths and the most common tags.

    `frequencies` has the tag frequency of each dataset.
    """
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    dropped = [skipped for subset in subsets for skipped in list_untrained(subset)]
    tags: Counter[str] = Counter()
    for frequency in frequencies:
        for counts in frequency.values():
            tags.update(counts)
    return {
        "datasets": [describe(number, *pair, draws) for number, pair in enumerate(zip(datasets, rules, strict=True))],
        "dropped": [{"file": path, "reason": reason} for path, reason in dropped[:MOST_NAMED]],
        "num_dropped": len(dropped),
        "caption_lengths": caption_lengths([subset.images.captions for subset in subsets], limit),
        "tags": [[tag, count] for tag, count in sorted(tags.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_TAGS]],
    }


def make_empty_values() -> dict[str, Any]:
    """Return the values of data without listed images."""
    lengths: dict[str, Any] = {"unit": "words", "most": None, "counts": []}
    return {"datasets": [], "dropped": [], "num_dropped": 0, "caption_lengths": lengths, "tags": []}


def list_untrained(subset: ScannedSubset) -> list[tuple[str, str]]:
    """Return (path, reason) of every image that is skipped."""
    return [*subset.dropped, *((path, "outside of skip_image_resolution") for path in subset.small)]


def describe(number: int, dataset: ScannedDataset, rule: BucketRules, draws: Draws) -> dict[str, Any]:
    """Describe one dataset as plain values."""
    return {
        "resolution": list(rule.resolution),
        "batch_size": dataset.config.batch_size,
        "subsets": [
            {
                "source": subset.config.source,
                "num_pictures": len(subset.images),
                "num_repeats": subset.config.num_repeats,
                "is_reg": subset.config.is_reg,
                "num_without_caption": len(subset.without_caption) + len(subset.empty_caption),
            }
            for subset in dataset.subsets
        ],
        "buckets": [
            {
                "width": bucket.size[0],
                "height": bucket.size[1],
                "num_draws": len(bucket.draws),
                "num_batches": bucket.num_batches,
            }
            for bucket in draws.buckets
            if bucket.dataset == number
        ],
    }


def caption_lengths(columns: Sequence[Texts], limit: TokenLimit | None) -> dict[str, Any]:
    """Count captions by length, as sorted pairs [length, count]; in tokens, or in words if tokenizing would take too
    long.

    `most` is the model's token limit, or None for words.
    """
    in_tokens = limit is not None and sum(map(len, columns)) <= MOST_COUNTED_AT_START
    count = limit.count if limit is not None and in_tokens else lambda caption: len(caption.split())
    counts = Counter(map(count, chain.from_iterable(columns)))
    return {
        "unit": "tokens" if in_tokens else "words",
        "most": limit.max_tokens if limit is not None and in_tokens else None,
        "counts": [[length, number] for length, number in sorted(counts.items())],
    }
