"""The data plan of a run, made before anything is encoded or drawn."""

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.base.collector import pause_collection
from library.base.errors import about, list_few, of_file
from library.data.description.buckets import BucketRules, Shape, Size
from library.data.description.captions import caption_variant
from library.data.description.class_images import drawn_alone
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import DatasetConfig, RunDataConfig, SubsetConfig
from library.data.description.source_keys import HUB_SOURCE
from library.data.plan.audit import MOST_COUNTED_AT_START, TokenLimit, audit_lines, held_out_lines, log_lengths_later
from library.data.plan.audit_values import collect_values
from library.data.plan.collect import collect
from library.data.plan.dataset_digest import dataset_identity, image_digests
from library.data.plan.dataset_metadata import TagFrequency, dataset_metadata, tag_frequency
from library.data.plan.order import epoch_batches
from library.data.plan.pair_checks import check_pairs
from library.data.plan.references import check_references
from library.data.plan.samples import (
    Draws,
    Sample,
    Samples,
    build_draws,
    build_samples,
    check_images,
    resolve_fixed_shape,
)
from library.data.plan.seen_references import SeenReferences
from library.data.plan.validation_split import Split, split_datasets, unchanging
from library.data.scanned.subsets import ScannedDataset
from library.data.sources.storage.storage import Storage
from library.options.caching import CachingOptions
from library.options.dataset import DatasetOptions
from library.options.train import TrainOptions
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DataPlan:
    """The images of a run: their shapes and buckets, and how they are drawn.

    A plan draws nothing and does not know the caches: caches turn a plan into stores, and batches are built from both.
    Code that needs fewer images, or draws them differently, derives another plan before anything is cached.
    """

    config: RunDataConfig
    split: Split
    rules: tuple[BucketRules, ...]  # of the trained datasets
    samples: Samples  # trained images, then held-out ones
    draws: Draws  # of an epoch
    draws_aside: Draws  # of held-out images, one each
    subsets: tuple[SubsetConfig, ...]  # of all datasets, in order
    seed: int
    validation_seed: int
    prior_loss_weight: float
    max_train_steps: int  # for tag warm-up
    spec: LatentSpec
    storage: Storage
    num_workers: int
    token_limit: TokenLimit | None  # None: caption lengths are not checked
    num_variants: int = 0  # variants of a caption to draw from; 0 composes a new caption for every draw
    seen: SeenReferences | None = None  # reference images for text encoders that see them
    unconditional: str | None = None  # a caption to cache besides those of the images, for --guidance_loss

    @property
    def datasets(self) -> tuple[ScannedDataset, ...]:
        return self.split.trained

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A description of the data that two runs can compare."""
        return dataset_identity(self.config, self.samples, self.num_batches, self.subsets)

    @cached_property
    def identity_with_contents(self) -> dict[str, Any]:
        """The identity with a digest of each image file, computed at the first call."""
        return {**self.identity, "contents": image_digests(self.samples, self.num_workers)}

    @property
    def image_paths(self) -> list[str]:
        """The files of all images, one for each sample, followed by those of the reference images and the masks."""
        return [
            *(key for images in self.samples.subsets for key in images.each_key()),
            *(reference.key for reference in self.samples.references),
            *self.samples.mask_paths,
        ]

    @property
    def image_plan(self) -> "DataPlan":
        return self

    @property
    def sizes(self) -> "DataPlan":
        return self

    prompts = own_batches = None  # batches are built from the plan and the caches

    # Counts

    @property
    def num_train_images(self) -> int:
        """The number of draws of training images per epoch, repeats included."""
        return self._count(is_reg=False)

    @property
    def num_reg_images(self) -> int:
        """The number of regularisation images times their repeats, including those that are not needed."""
        return self._count(is_reg=True)

    def _count(self, is_reg: bool) -> int:
        subsets = [subset for dataset in self.datasets for subset in dataset.subsets]
        return sum(len(s.images) * s.config.num_repeats for s in subsets if s.config.is_reg == is_reg)

    @property
    def num_batches(self) -> int:
        return sum(bucket.num_batches for bucket in self.draws.buckets)

    @property
    def batch_sizes(self) -> list[int]:
        return [dataset.config.batch_size for dataset in self.datasets]

    def batch_shapes(self) -> Iterator[tuple[int, tuple[Size, ...]]]:
        """Yield (images per full batch, (image size, *reference sizes)) of each bucket."""
        for bucket in self.draws.buckets:
            yield min(bucket.batch_size, len(bucket.draws)), (bucket.size, *bucket.reference_sizes)

    def subset_of(self, sample: Sample) -> SubsetConfig:
        return self.subsets[sample.subset]

    @property
    def shared_texts(self) -> tuple[str, ...]:
        """The texts to encode that belong to no image: the empty prompt, and the unconditional caption."""
        return tuple(dict.fromkeys(("", self.unconditional or "")))

    def caption_texts(self) -> Iterator[tuple[str, ...]]:
        """Yield the texts to encode for each sample: its caption's distinct variants, or none if it is never drawn."""
        for number, sample in enumerate(self.samples):
            if not sample.num_draws:
                yield ()
                continue
            image, rules = sample.image, self.subset_of(sample).captions
            variants = range(self.num_variants if rules.varies else 1)
            texts = tuple(dict.fromkeys(caption_variant(image.key, image.caption, rules, v) for v in variants))
            also = () if self.unconditional is None else (self.unconditional,)
            yield texts if self.seen is None else self.seen.texts(number, sample, texts, self.subset_of(sample), also)

    # Reports

    def audit(self, log: logging.Logger) -> None:
        """Log the data and its problems. For large sets, overlong captions are logged later by a background thread."""
        counts_at_once = len(self.samples) <= MOST_COUNTED_AT_START
        limit = self.token_limit if counts_at_once else None
        for level, line in audit_lines(
            self.datasets, self.rules, self.samples, self.draws, limit, self.storage, self.spec.has_alpha
        ):
            log.log(level, "%s", line)
        if self.token_limit is not None and not counts_at_once:
            log_lengths_later(self.datasets, self.token_limit, log)
        for level, line in (*self.split.lines, *held_out_lines(self.datasets, self.split.set_aside)):
            log.log(level, "%s", line)

    def audit_values(self) -> dict[str, Any]:
        """Return the results of the audit as plain values, for programs."""
        return collect_values(self.datasets, self.rules, self.draws, self._tag_frequencies, self.token_limit)

    def metadata(self, described: DatasetOptions, batches_per_step: int = 1) -> dict[str, Any]:
        """Describe the data as `ss_*` values. Callers write tables and lists as JSON."""
        frequencies = self._tag_frequencies
        return dataset_metadata(
            self.config, self.datasets, self.rules, self.samples, frequencies, described, batches_per_step
        )

    @property
    def largest_resolution(self) -> Size:
        """The largest bucket base of the trained datasets."""
        return max((rule.resolution for rule in self.rules), key=math.prod)

    # Counting the tags of a million captions takes 3 s, and both the report and the metadata need them.
    @cached_property
    def _tag_frequencies(self) -> list[TagFrequency]:
        return [tag_frequency(dataset) for dataset in self.datasets]

    # Derived plans

    def with_fixed_captions(self, num_variants: int) -> "DataPlan":
        """Return a plan that draws each caption from `num_variants` variants, listed by `caption_texts`, or the empty
        prompt.

        Raises UserError for a subset whose captions change in every step.
        """
        for subset in self.subsets:
            if subset.captions.token_warmup_step > 0:
                raise of_file(subset.source)(
                    ": --token_warmup_step changes captions in every step, but --cache_text_encoder_outputs stores a "
                    "few per image",
                    "remove one of them",
                )
        return replace(self, num_variants=num_variants)

    def with_seen_references(self) -> "DataPlan":
        """Return a plan for text encoders that also see the reference images. Raises UserError if
        `SeenReferences.of` does."""
        seen = SeenReferences.of(self.samples, self.subsets, self.storage, self.spec.has_alpha, self.num_workers)
        return replace(self, seen=seen)

    @property
    def has_references(self) -> bool:
        """True if any image has reference images; the partners of opposite_dir are none, although stored as such."""
        scanned = zip(self.subsets, self.samples.subsets, strict=True)
        return any(images.references is not None and not config.opposite_dir for config, images in scanned)

    def limited_to_largest_batch(self) -> tuple["DataPlan", int]:
        """Return (a plan that draws only the images of the largest batch, the index of that batch in the first epoch),
        so that only these images are cached.

        The numbers of batches and images are unchanged. The largest batch has the most pixels.
        """
        batches = epoch_batches(self.draws.buckets, self.seed, 1)
        pixels_M = [sum(map(math.prod, shape.sizes)) for shape in self.samples.shapes]

        def numbers_at(place: int) -> list[int]:
            return [int(number) for number in self.draws.sample_of_draw[list(batches[place])]]

        def num_pixels(place: int) -> int:
            return sum(pixels_M[self.samples.shape_N[number]] for number in numbers_at(place))

        largest = max(range(len(batches)), key=num_pixels)
        return self._limited_to(numbers_at(largest)), largest

    def limited_to_measured(
        self, count: int, aside: Collection[int], are_mirrored: bool = False
    ) -> tuple["DataPlan", list[int]]:
        """Return (a plan of `count` evenly spread trained images and the held-out samples `aside`, the indices of those
        trained images).

        Trained images are drawn like held-out ones: cropped at the centre, with the whole caption. With `are_mirrored`
        their mirror images are measured too.
        """
        is_reg = np.array([subset.is_reg for subset in self.subsets], dtype=bool)
        is_trained_N = (self.samples.dataset_of_each() < len(self.datasets)) & ~is_reg[self.samples.subset_of_each()]
        trained = np.flatnonzero(is_trained_N & (self.samples.draws_N > 0)).tolist()
        count = min(count, len(trained))
        chosen = [trained[i * len(trained) // count] for i in range(count)]
        shapes: dict[int, Shape] = {}
        for number in chosen:
            sample = self.samples[number]
            subset = self.subset_of(sample)
            if subset.random_crop and not self.rules[sample.dataset].enable_bucket:
                shape = resolve_fixed_shape(sample.image.size, sample.shape.bucket, unchanging(subset))
                # References of randomly cropped images have the shape of their image, see `check_references`.
                shapes[number] = replace(shape, references=(shape,) * len(sample.image.references))
        limited = self._limited_to([*chosen, *aside], shapes, draws_once=chosen)
        seen = None if self.seen is None else replace(self.seen, are_measured_mirrored=are_mirrored)
        return replace(limited, subsets=tuple(unchanging(subset) for subset in self.subsets), seen=seen), chosen

    def _limited_to(
        self, kept: Collection[int], shapes: Mapping[int, Shape] | None = None, draws_once: Collection[int] = ()
    ) -> "DataPlan":
        draws_N: NDArray[np.int32] = np.zeros_like(self.samples.draws_N)
        draws_N[list(kept)] = self.samples.draws_N[list(kept)]
        draws_N[list(draws_once)] = 1
        return replace(self, samples=self.samples.changed(shapes or {}, draws_N))


def caches_to_disk(values: Mapping[str, Any]) -> bool:
    """Return True if the values of options keep a cache on disk."""
    return any(values.get(f"{name}_to_disk") for name in ("cache_latents", "cache_text_encoder_outputs"))


def open_storage(caching: CachingOptions, output_dir: str | None, is_dry: bool) -> Storage:
    """Return the access to images. What is kept of folders that cannot be written goes below the output folder, unless
    the options name another; a dry run writes nothing."""
    is_named = caching.cache_dir is not None or caching.shared_cache_dir is not None
    return Storage(
        caching.cache_dir,
        caching.remote_cache_gb,
        caching.shared_cache_dir,
        spare_dir=os.path.join(output_dir, "cache") if output_dir and not is_named else None,
        keeps_indexes=not is_dry,
    )


def find_unwritable(scanned: Iterable[ScannedDataset], place: str | None) -> frozenset[str]:
    """Return the folders of images that cannot be written, and whose caches go to `place`; none without it."""
    images = [subset.images for dataset in scanned for subset in dataset.subsets]
    folders = {folder for each in images if each.cache_directory is None for folder in each.local_folders()}
    unwritable = [] if place is None else [folder for folder in sorted(folders) if not is_writable(folder)]
    if unwritable:
        logger.info("caches go into %s, because these folders cannot be written: %s", place, list_few(unwritable))
    return frozenset(unwritable)


def is_writable(folder: str) -> bool:
    """Return True if a file can be created in a folder; permissions do not tell on Windows and on network drives."""
    try:
        with TemporaryFile(dir=folder or "."):
            return True
    except OSError:
        return False


@pause_collection()
def build_plan(
    options: TrainOptions,
    spec: LatentSpec,
    seed: int,
    count_tokens: Callable[[str], int] | None,
    max_tokens: int | None,
    num_processes: int = 1,
    entries: Sequence[tuple[str, Any]] | None = None,
    draw: Callable[[RunDataConfig], None] | None = None,
    revisions: Mapping[str, str] = MappingProxyType({}),
) -> DataPlan:
    """Read the dataset description, list the images and sort them into buckets, without decoding any.

    `entries` is the content of `in_json`, if already read; `draw` draws the missing images of subsets with a prompt,
    which are left out without it. `revisions` are those of a state, for data sets of the hub that are named without
    one. Raises NoDataFound if there are no training images,
    UserError for other mistakes in the description.
    """
    config = load_dataset_config(options)
    spec = replace(spec, needs_references=spec.needs_references or needs_references(options.flat(), spec))
    if entries is not None:
        config = config.with_subsets(entries=entries)
    # The description is checked before the images are listed, which takes longer.
    check_pairs(config, options.pairs.are_trained)
    caches_latents = options.caching.cache_latents or options.caching.cache_latents_to_disk
    if caches_latents:
        check_drawing(config)
    # A warning instead of an error: front ends send this key with enable_bucket, and sd-scripts ignores it there.
    config = drop_unused_face_crops(config, caches_latents)
    subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
    is_on_disk = caches_to_disk(options.flat())
    if options.caching.cache_dir is not None and not is_on_disk and not any(s.patterns for s in subsets):
        logger.warning("--cache_dir gets nothing but indexes: nothing is cached on disk; add --cache_latents_to_disk")
    config = with_revisions(with_drawn_images(config, draw), revisions)
    storage = open_storage(options.caching, options.saving.output_dir, options.diagnostics.dry_run)
    scanned = collect(config, storage)
    check_images(scanned)
    if is_on_disk:
        storage = replace(storage, unwritable=find_unwritable(scanned, storage.spare_dir))
    split = split_datasets(scanned, seed)
    datasets = (*split.trained, *split.set_aside)
    num_trained = len(split.trained)
    rules = bucket_rules([dataset.config for dataset in datasets], spec)
    samples = build_samples(datasets, rules)
    subset_configs = tuple(subset.config for dataset in datasets for subset in dataset.subsets)
    check_references(subset_configs, samples, spec)
    configs = [dataset.config for dataset in datasets]
    draws = build_draws(samples, configs, range(num_trained))
    validation_seed = options.validation.validation_seed
    return DataPlan(
        config=config,
        split=split,
        rules=rules[:num_trained],
        samples=samples,
        draws=draws,
        draws_aside=build_draws(samples, configs, range(num_trained, len(datasets))),
        subsets=subset_configs,
        seed=seed,
        validation_seed=seed if validation_seed is None else validation_seed,
        prior_loss_weight=options.dataset.prior_loss_weight,
        max_train_steps=options.run.planned_steps(sum(b.num_batches for b in draws.buckets), num_processes),
        spec=spec,
        storage=storage,
        num_workers=options.dataset.max_data_loader_n_workers,
        token_limit=None if count_tokens is None or max_tokens is None else TokenLimit(count_tokens, max_tokens),
    )


def with_revisions(config: RunDataConfig, revisions: Mapping[str, str]) -> RunDataConfig:
    """Return the description with the revisions of data sets of the hub that are named without one."""

    def pin(subset: SubsetConfig) -> SubsetConfig:
        names = (f"{name}@{revisions[name]}" if name in revisions else name for name in subset.patterns)
        return replace(subset, patterns=tuple(names)) if subset.source_key == HUB_SOURCE else subset

    return replace(config, datasets=tuple(replace(d, subsets=tuple(map(pin, d.subsets))) for d in config.datasets))


def needs_references(values: Mapping[str, Any], spec: LatentSpec) -> bool:
    """Return True if the values of options ask for reference images, which the base model takes (--edit)."""
    return bool(values.get("edit") and spec.max_references)


def with_drawn_images(config: RunDataConfig, draw: Callable[[RunDataConfig], None] | None) -> RunDataConfig:
    """Draw the missing images of subsets with a prompt. Without `draw`, return the description without such subsets,
    and name them."""
    if draw is not None:
        draw(config)
        return config
    config, absent = drawn_alone(config)
    for subset in absent:
        logger.info("%d images of %r are left out here: a training draws them first", subset.num, subset.prompt)
    return config


def bucket_rules(configs: Sequence[DatasetConfig], spec: LatentSpec) -> tuple[BucketRules, ...]:
    """Build the bucket rules of each dataset. Raises UserError if they do not fit together or the base model."""
    unchecked = [
        BucketRules(
            config.resolution,
            config.enable_bucket,
            config.min_bucket_reso,
            config.max_bucket_reso,
            # 0 selects the step of the base model, see `flat_datasets`.
            config.bucket_reso_steps or spec.bucket_step,
            config.bucket_no_upscale,
            spec.bucket_step,
        )
        for config in configs
    ]
    # Equal rules, such as those of the held-out images of a dataset, are checked once: every check logs its warnings.
    checked = {rules: check_rules(rules, spec) for rules in dict.fromkeys(unchecked)}
    return tuple(checked[rules] for rules in unchecked)


def check_rules(rules: BucketRules, spec: LatentSpec) -> BucketRules:
    """Return the rules with limits in steps of the buckets; warn of sizes that are rounded."""
    width, height = rules.resolution
    rounded = width // spec.downscale * spec.downscale, height // spec.downscale * spec.downscale
    if not rules.enable_bucket and not spec.fits(width, height):
        step = spec.downscale * spec.patch
        raise about("resolution")(
            f"is {width}x{height}, but without enable_bucket this base model needs multiples of {step}",
            f"use {max(width // step, 1) * step}x{max(height // step, 1) * step}, or set enable_bucket",
        )
    if not rules.enable_bucket and rounded != rules.resolution:
        logger.warning(
            "resolution %dx%d is not a multiple of %d, the pixels of one latent: images are trained at %dx%d",
            width,
            height,
            spec.downscale,
            *rounded,
        )
    return rules.checked()


def check_drawing(config: RunDataConfig) -> None:
    """Raise UserError for subsets whose images change in every draw, so that latents cannot be cached."""
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        for name in subset.changing:
            raise of_file(subset.source)(
                f": --{name} changes the image in every draw, but --cache_latents stores one", "remove one of them"
            )


def drop_unused_face_crops(config: RunDataConfig, caches_latents: bool) -> RunDataConfig:
    """Drop face_crop_aug_range, with a warning, where buckets or cached latents determine the crop."""
    datasets = []
    for dataset in config.datasets:
        reason = "enable_bucket" if dataset.enable_bucket else "cache_latents" if caches_latents else None
        affected = [subset.source for subset in dataset.subsets if subset.face_crop_aug_range is not None]
        if reason is not None and affected:
            logger.warning("face_crop_aug_range has no effect with %s: %s", reason, list_few(affected))
            dataset = replace(dataset, subsets=tuple(replace(s, face_crop_aug_range=None) for s in dataset.subsets))
        datasets.append(dataset)
    return replace(config, datasets=tuple(datasets))
