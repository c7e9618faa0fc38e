"""The metadata of saved files about the data, which programs that display adapters read."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from library.data.description.buckets import BucketRules, Size, ratio_error
from library.data.description.schema import RunDataConfig
from library.data.plan.samples import Samples
from library.data.scanned.subsets import ScannedDataset, ScannedSubset
from library.options.dataset import DatasetOptions

MOST_TAGS = 100_000  # per folder; a safetensors header is limited to 100 MB

TagFrequency = dict[str, dict[str, int]]


def dataset_metadata(
    config: RunDataConfig,
    datasets: Sequence[ScannedDataset],
    rules: Sequence[BucketRules],
    samples: Samples,
    frequencies: Sequence[TagFrequency],
    described: DatasetOptions,
    batches_per_step: int,
) -> dict[str, Any]:
    """Describe the data as `ss_*` values: a list of datasets if a dataset file describes them, else single keys.

    `frequencies` has the tag frequency of each dataset. `batches_per_step` counts the batches of all processes.
    """
    infos = [bucket_info(rule, samples, number) for number, rule in enumerate(rules)]
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    if config.is_from_file:
        merged: TagFrequency = {}
        for frequency in frequencies:
            for name, counts in frequency.items():
                merged.setdefault(name, counts)  # count a folder used by several datasets once
        return {
            "ss_datasets": [
                describe_dataset(dataset, rule, frequency, info)
                for dataset, rule, frequency, info in zip(datasets, rules, frequencies, infos, strict=True)
            ],
            "ss_tag_frequency": merged,
            "ss_dataset_dirs": dataset_dirs([subset for subset in subsets if not subset.config.is_reg]),
        }
    (dataset,), (rule,) = datasets, rules
    return {
        "ss_batch_size_per_device": dataset.config.batch_size,
        "ss_total_batch_size": dataset.config.batch_size * batches_per_step,
        "ss_resolution": str(rule.resolution),
        "ss_color_aug": described.color_aug,
        "ss_flip_aug": described.flip_aug,
        "ss_random_crop": described.random_crop,
        "ss_shuffle_caption": described.shuffle_caption,
        "ss_enable_bucket": rule.enable_bucket,
        "ss_bucket_no_upscale": dataset.config.bucket_no_upscale,
        "ss_min_bucket_reso": rule.min_reso if rule.enable_bucket else None,
        "ss_max_bucket_reso": rule.max_reso if rule.enable_bucket else None,
        "ss_keep_tokens": described.keep_tokens,
        "ss_dataset_dirs": dataset_dirs([subset for subset in subsets if not subset.config.is_reg]),
        "ss_reg_dataset_dirs": dataset_dirs([subset for subset in subsets if subset.config.is_reg]),
        "ss_tag_frequency": frequencies[0],
        "ss_bucket_info": "null" if infos[0] is None else infos[0],  # becomes JSON in both cases
    }


def describe_dataset(
    dataset: ScannedDataset, rule: BucketRules, frequency: TagFrequency, info: dict[str, Any] | None
) -> dict[str, Any]:
    """Describe one dataset in `ss_datasets`."""
    config = dataset.config
    counts = {
        is_reg: sum(len(s.images) * s.config.num_repeats for s in dataset.subsets if s.config.is_reg == is_reg)
        for is_reg in (False, True)
    }
    return {
        "is_dreambooth": config.style != "metadata",
        "batch_size_per_device": config.batch_size,
        "num_train_images": counts[False],
        "num_reg_images": counts[True],
        "resolution": list(rule.resolution),
        "enable_bucket": rule.enable_bucket,
        "min_bucket_reso": rule.min_reso if rule.enable_bucket else None,
        "max_bucket_reso": rule.max_reso if rule.enable_bucket else None,
        "skip_image_resolution": config.skip_image_resolution and list(config.skip_image_resolution),
        "tag_frequency": frequency,
        "bucket_info": info,
        "resize_interpolation": config.resize_interpolation,
        "subsets": [describe_subset(subset) for subset in dataset.subsets],
    }


def describe_subset(subset: ScannedSubset) -> dict[str, Any]:
    config = subset.config
    described = {
        "img_count": len(subset.images),
        "num_repeats": config.num_repeats,
        "color_aug": config.color_aug,
        "flip_aug": config.flip_aug,
        "random_crop": config.random_crop,
        "shuffle_caption": config.captions.shuffle_caption,
        "keep_tokens": config.captions.keep_tokens,
        "keep_tokens_separator": config.captions.keep_tokens_separator,
        "secondary_separator": config.captions.secondary_separator,
        "enable_wildcard": config.captions.enable_wildcard,
        "caption_prefix": config.captions.caption_prefix,
        "caption_suffix": config.captions.caption_suffix,
        "resize_interpolation": config.resize_interpolation,
        **({"trigger_word": config.captions.trigger_word} if config.captions.trigger_word else {}),
    }
    if config.style == "metadata":
        if config.image_dir:
            described["image_dir"] = config.image_dir.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        described["metadata_file"] = config.base_name
        return described
    return described | {"image_dir": config.base_name, "class_tokens": config.class_tokens, "is_reg": config.is_reg}


def tag_frequency(dataset: ScannedDataset) -> TagFrequency:
    """Count the images of each tag, by folder. Tags are separated by commas, in captions or in a metadata file.

    If there are more tags than a header can hold, only the most common are kept. Such sets have sentences as captions,
    which rarely repeat.
    """
    frequency: dict[str, Counter[str]] = {}
    for subset in dataset.subsets:
        name = subset.config.base_name
        counts = frequency.setdefault(name, Counter())
        # As in sd-scripts, only the tags of a metadata file count, not its captions.
        texts = subset.images.captions if subset.images.tags is None else subset.images.tags
        for text in texts:
            if "\n" in text:
                text = text.replace("\n", ",")
            tags = dict.fromkeys([tag.strip().lower() for tag in text.split(",")])
            tags.pop("", None)
            counts.update(tags.keys())
            # Pruned on the way, because sentences as captions would fill the memory with tags that occur once.
            if len(counts) > 2 * MOST_TAGS:
                frequency[name] = counts = most_common_tags(counts)
    return {name: dict(most_common_tags(counts)) for name, counts in frequency.items()}


def most_common_tags(counts: Counter[str]) -> Counter[str]:
    return counts if len(counts) <= MOST_TAGS else Counter(dict(counts.most_common(MOST_TAGS)))


def bucket_info(rule: BucketRules, samples: Samples, dataset: int) -> dict[str, Any] | None:
    """Return the draws of each bucket and the mean aspect ratio error; None without buckets."""
    if not rule.enable_bucket:
        return None
    counts: Counter[tuple[int, int]] = Counter()
    errors: list[float] = []
    error_by_size: dict[tuple[int, Size], float] = {}
    dataset_rows = samples.slice_of(dataset)
    rows = zip(
        samples.shape_N[dataset_rows].tolist(),
        samples.sizes()[dataset_rows].tolist(),
        samples.draws_N[dataset_rows].tolist(),
        strict=True,
    )
    for shape, (width, height), num_draws in rows:
        if num_draws:
            bucket = samples.shapes[shape].bucket
            counts[bucket] += num_draws
            if (shape, (width, height)) not in error_by_size:
                error_by_size[shape, (width, height)] = ratio_error(bucket, (width, height))
            errors.append(error_by_size[shape, (width, height)])
    buckets = {
        str(index): {"resolution": list(size), "count": counts[size]} for index, size in enumerate(sorted(counts))
    }
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0}


def dataset_dirs(subsets: Sequence[ScannedSubset]) -> dict[str, dict[str, int]]:
    """Return repeats and number of images by folder name. Further folders of the same name get ` (2)`, ` (3)` and so
    on."""
    described: dict[str, dict[str, int]] = {}
    for subset in subsets:
        name, number = subset.config.base_name, 2
        while name in described:
            name = f"{subset.config.base_name} ({number})"
            number += 1
        described[name] = {"n_repeats": subset.config.num_repeats, "img_count": len(subset.images)}
    return described
