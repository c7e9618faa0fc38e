"""The pictures of a run and the batches drawn from them."""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader

from library.collector import without_collection
from library.data.batches.batches import (
    BatchMaker,
    BatchSampler,
    Orders,
    PartialBatch,
    finish_batch,
    hand_over,
    start_worker,
)
from library.data.batches.order import epoch_batches
from library.data.batches.validation_set import ValidationSet, open_validation_set
from library.data.caching.latent_files import Latents
from library.data.caching.stores import LatentFiles, LatentStore, TextStore
from library.data.description.audit import MOST_COUNTED_AT_START, TokenLimit, audit_lines, log_lengths_later
from library.data.description.buckets import BucketRules, Shape
from library.data.description.captions import caption_variant
from library.data.description.dataset_digest import dataset_identity, picture_digests
from library.data.description.facts import dataset_facts
from library.data.description.schema import DatasetConfig, NoDataFound, RunDataConfig, SubsetConfig, load_dataset_config
from library.data.description.summary import TagFrequency, dataset_metadata, tag_frequency
from library.data.description.validation_split import Split, identities_of_pictures, split_datasets, unchanging
from library.data.sources.collect import collect
from library.data.sources.samples import Draws, Sample, Samples, build_draws, build_samples, check_pictures, fixed_shape
from library.data.sources.storage import Storage
from library.errors import UserError
from library.options.train import TrainOptions
from library.protocols import LatentSpec
from library.types import Batch

__all__ = ["NoDataFound", "TrainingSet"]

logger = logging.getLogger(__name__)


class TrainingSet:
    """What a run trains on. Batches are a function of (seed, epoch, place in the epoch)."""

    def __init__(
        self,
        config: RunDataConfig,
        split: Split,
        rules: tuple[BucketRules, ...],
        samples: Samples,
        draws: Draws,
        validation_draws: Draws,
        validation_seed: int,
        maker: BatchMaker,
        spec: LatentSpec,
        token_limit: TokenLimit | None,
        num_workers: int,
    ) -> None:
        self.config = config
        self.datasets = split.trained
        self.rules = rules[: len(split.trained)]
        self.split = split
        self.samples = samples
        self.draws = draws
        self._validation_draws = validation_draws
        self._validation_seed = validation_seed
        self.spec = spec
        self.num_workers = num_workers
        self._maker = maker
        self._token_limit = token_limit
        self._latents: Mapping[int, Latents] = {}
        self._texts = TextStore()
        self._orders = BatchSampler(Orders(1, (), (), int))
        self._skipped: Counter[str] = Counter()  # what is said of damaged pictures, and how often they were drawn
        self._lasting_loader: DataLoader[PartialBatch | str] | None = None

    @classmethod
    @without_collection()
    def build(
        cls,
        options: TrainOptions,
        spec: LatentSpec,
        seed: int,
        count_tokens: Callable[[str], int] | None,
        max_tokens: int | None,
        num_processes: int = 1,
    ) -> "TrainingSet":
        """Read the description, list the pictures and sort them into buckets; no picture is decoded.

        Raises NoDataFound where there is nothing to train on, ValueError for every other mistake in the description.
        """
        config = load_dataset_config(options)
        if options.faults.dry_run:
            config = config.without_index()
        check_drawing(config, options)
        subsets = [subset for dataset in config.datasets for subset in dataset.subsets]
        if options.caching.cache_dir is not None and not any(subset.patterns for subset in subsets):
            logger.warning("--cache_dir has no effect: it is for shards and parquet, caches of files lie beside them")
        storage = Storage(options.caching.cache_dir, options.caching.remote_cache_gb)
        found = collect(config, storage)
        check_pictures(found)
        split = split_datasets(found, seed)
        datasets = (*split.trained, *split.set_aside)
        num_trained = len(split.trained)
        rules = tuple(bucket_rules(dataset.config, spec) for dataset in datasets)
        samples = build_samples(datasets, rules)
        configs = [dataset.config for dataset in datasets]
        draws = build_draws(samples, configs, range(num_trained))
        validation_draws = build_draws(samples, configs, range(num_trained, len(datasets)))
        validation_seed = options.validation.validation_seed
        maker = BatchMaker(
            seed=seed,
            samples=samples,
            sample_of_draw=draws.sample_of_draw,
            subsets=tuple(subset.config for dataset in datasets for subset in dataset.subsets),
            prior_loss_weight=options.dataset.prior_loss_weight,
            max_train_steps=options.run.planned_steps(sum(b.num_batches for b in draws.buckets), num_processes),
            files=LatentFiles(),
            in_memory=frozenset(),
            storage=storage,
        )
        limit = None if count_tokens is None or max_tokens is None else TokenLimit(count_tokens, max_tokens)
        workers = options.dataset.max_data_loader_n_workers
        return cls(
            config,
            split,
            rules,
            samples,
            draws,
            validation_draws,
            seed if validation_seed is None else validation_seed,
            maker,
            spec,
            limit,
            workers,
        )

    @property
    def validation(self) -> ValidationSet:
        """The pictures that are set aside, with what is cached by now."""
        draws = self._validation_draws
        maker = replace(self._maker, seed=self._validation_seed)
        return open_validation_set(maker, self._finished, draws, self.split.identities)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the data is, in a few words that two runs can compare."""
        return dataset_identity(self.config, self.samples, self.num_batches)

    @property
    def picture_paths(self) -> list[str]:
        """The files of all pictures, one for each sample."""
        return [key for pictures in self.samples.subsets for key in pictures.each_key()]

    @cached_property
    def identity_with_contents(self) -> dict[str, Any]:
        """The identity, and a digest of each picture's file as it is when this is first asked for."""
        return {**self.identity, "contents": picture_digests(self.samples, max(1, self.num_workers))}

    # Counts

    @property
    def num_train_images(self) -> int:
        """Draws of training pictures in an epoch, repeats included."""
        return self._count(is_reg=False)

    @property
    def num_reg_images(self) -> int:
        """Regularisation pictures times their own repeats, whether they are needed or not."""
        return self._count(is_reg=True)

    def _count(self, is_reg: bool) -> int:
        subsets = [subset for dataset in self.datasets for subset in dataset.subsets]
        return sum(len(s.pictures) * s.config.num_repeats for s in subsets if s.config.is_reg == is_reg)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return sum(bucket.num_batches for bucket in self.draws.buckets)

    @property
    def batch_sizes(self) -> list[int]:
        """The batch size of each dataset."""
        return [dataset.config.batch_size for dataset in self.datasets]

    @property
    def storage(self) -> Storage:
        """What opens the pictures."""
        return self._maker.storage

    def batch_shapes(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """How many pictures of which size (width, height) the full batches of each bucket have."""
        for bucket in self.draws.buckets:
            first = self.samples[int(self.draws.sample_of_draw[int(bucket.draws[0])])]
            yield min(bucket.batch_size, len(bucket.draws)), first.shape.bucket

    def subset_of(self, sample: Sample) -> SubsetConfig:
        """The settings of a sample's subset."""
        return self._maker.subsets[sample.subset]

    def audit(self, log: logging.Logger) -> None:
        """Log what was found and what is wrong with it; in large sets, captions that are too long follow later."""
        counts_at_once = len(self.samples) <= MOST_COUNTED_AT_START
        limit = self._token_limit if counts_at_once else None
        for level, line in audit_lines(self.datasets, self.rules, self.samples, self.draws, limit):
            log.log(level, "%s", line)
        if self._token_limit is not None and not counts_at_once:
            log_lengths_later(self.datasets, self._token_limit, log)
        for level, line in self.split.lines:
            log.log(level, "%s", line)

    def facts(self) -> dict[str, Any]:
        """The same as plain values, for programs."""
        return dataset_facts(self.datasets, self.rules, self.draws, self._tag_frequencies, self._token_limit)

    def metadata(self, options: TrainOptions, num_processes: int = 1) -> dict[str, Any]:
        """The `ss_*` values that describe the data; tables and lists are to be written as JSON."""
        frequencies = self._tag_frequencies
        return dataset_metadata(
            self.config, self.datasets, self.rules, self.samples, frequencies, options, num_processes
        )

    @cached_property
    def _tag_frequencies(self) -> list[TagFrequency]:
        return [tag_frequency(dataset) for dataset in self.datasets]

    def limit_to_largest_batch(self) -> int:
        """Forget the draws of all other pictures, so that only these are cached; gives its place in the first epoch.

        The numbers of batches and pictures stay. Largest are the most pixels together.
        """
        batches = epoch_batches(self.draws.buckets, self._maker.seed, 1)
        pixels_M = [math.prod(shape.bucket) for shape in self.samples.shapes]

        def numbers_at(place: int) -> list[int]:
            return [int(number) for number in self.draws.sample_of_draw[list(batches[place])]]

        def num_pixels(place: int) -> int:
            return sum(pixels_M[self.samples.shape_N[number]] for number in numbers_at(place))

        largest = max(range(len(batches)), key=num_pixels)
        self._limit_to(set(numbers_at(largest)))
        return largest

    def _limit_to(self, kept: AbstractSet[int], shapes: Mapping[int, Shape] | None = None) -> None:
        draws_N = np.zeros_like(self.samples.draws_N)
        rows = sorted(kept)
        draws_N[rows] = self.samples.draws_N[rows]
        self.samples = self.samples.changed(shapes or {}, draws_N)
        self._maker = replace(self._maker, samples=self.samples)

    # Measuring trained pictures

    def limit_to_measured(self, count: int, batches_aside: Sequence[int]) -> list[int]:
        """Forget all pictures but `batches_aside` of those that are set aside and, spread evenly, `count` trained ones.

        To be called before anything is cached. Trained pictures are drawn as those that are set aside from here on:
        cropped at the centre, with the whole caption. Gives the numbers of the trained samples.
        """
        is_reg = np.array([subset.is_reg for subset in self._maker.subsets], dtype=bool)
        is_trained_N = (self.samples.dataset_of_each() < len(self.datasets)) & ~is_reg[self.samples.subset_of_each()]
        trained = np.flatnonzero(is_trained_N & (self.samples.draws_N > 0)).tolist()
        count = min(count, len(trained))
        chosen = [trained[i * len(trained) // count] for i in range(count)]
        shapes: dict[int, Shape] = {}
        for number in chosen:
            sample = self.samples[number]
            subset = self.subset_of(sample)
            if subset.random_crop and not self.rules[sample.dataset].enable_bucket:
                shapes[number] = fixed_shape(sample.picture.size, sample.shape.bucket, unchanging(subset))
        self._limit_to({*chosen, *self.validation.samples_of(batches_aside)}, shapes)
        draws_N = self.samples.draws_N.copy()
        draws_N[chosen] = 1
        self.samples = self.samples.changed({}, draws_N)
        subsets = tuple(unchanging(subset) for subset in self._maker.subsets)
        self._maker = replace(self._maker, samples=self.samples, subsets=subsets)
        return chosen

    def trained(self, numbers: Sequence[int], is_mirrored: bool = False) -> ValidationSet:
        """Trained pictures as batches that are measured, with what is cached by now."""
        draws_N = np.zeros_like(self.samples.draws_N)
        draws_N[list(numbers)] = 1
        samples = self.samples.changed({}, draws_N)
        datasets = (*self.split.trained, *self.split.set_aside)
        draws = build_draws(samples, [dataset.config for dataset in datasets], range(len(self.datasets)))
        identities = {**self.split.identities, **identities_of_pictures(samples[number].picture for number in numbers)}
        maker = replace(self._maker, seed=self._validation_seed, is_mirrored=is_mirrored)
        return open_validation_set(maker, self._finished, draws, identities)

    # Latents

    def use_latents(self, store: LatentStore) -> None:
        """Draw cached latents in place of pixels. Raises UserError where none can stand in for a damaged picture."""
        self._latents = store.memory
        in_memory = frozenset(store.memory)
        self._maker = replace(self._maker, files=store.files, in_memory=in_memory, damaged=store.damaged)
        for number in store.damaged:
            self._maker.stand_in(number, store.damaged)
        self.close()

    # Captions

    def fix_captions(self, num_variants: int) -> None:
        """Draw each caption from `num_variants` versions of it, which `caption_texts` lists, and the empty prompt.

        Raises UserError for a subset whose captions are other ones in every step.
        """
        for subset in self._maker.subsets:
            if subset.captions.token_warmup_step > 0:
                raise UserError(
                    f"{subset.source}: --token_warmup_step makes other captions in every step, and "
                    "--cache_text_encoder_outputs keeps a few of each picture; leave one of them out"
                )
        self._maker = replace(self._maker, num_variants=num_variants)
        self.close()

    def caption_texts(self) -> Iterator[tuple[str, ...]]:
        """For each sample the versions of its caption, without repetition; none for one that is not drawn."""
        for sample in self.samples:
            if not sample.num_draws:
                yield ()
                continue
            picture, rules = sample.picture, self.subset_of(sample).captions
            variants = range(self._maker.num_variants if rules.varies else 1)
            yield tuple(dict.fromkeys(caption_variant(picture.key, picture.caption, rules, v) for v in variants))

    def use_texts(self, store: TextStore) -> None:
        """Draw cached text features in place of captions."""
        self._texts = store
        self._maker = replace(self._maker, text_files=store.files)
        self.close()

    # Batches

    def batches(
        self,
        epoch: int,
        places: Sequence[int],
        step_of: Callable[[int], int],
        num_workers: int,
        persistent_workers: bool,
    ) -> Iterator[Batch]:
        """The batches of an epoch (from 1) at `places` (from 0), in their order; the others are not read.

        `step_of(i)` is the optimizer step that batch i belongs to. With `persistent_workers` the worker processes live
        until `close`. Raises UserError naming a picture that cannot be read.
        """
        assert epoch >= 1, epoch
        draws = epoch_batches(self.draws.buckets, self._maker.seed, epoch)
        orders = Orders(epoch, draws, places, step_of)
        if not self._needs_workers:
            num_workers = 0
        num_workers = min(num_workers, os.cpu_count() or 1, self.num_batches)
        if num_workers == 0:
            return (self._finished(self._maker[order]) for order in orders)
        return self._from_workers(orders, num_workers, persistent_workers)

    def close(self) -> None:
        """End worker processes that outlive an epoch."""
        self._lasting_loader = None

    @property
    def _needs_workers(self) -> bool:
        # Captions alone are cheaper to make than to send.
        maker = self._maker
        if any(pictures.masks is not None for pictures in self.samples.subsets):
            return True
        return any(
            (number not in maker.in_memory or number in maker.text_files) and number not in maker.damaged
            for number in np.flatnonzero(self.samples.draws_N).tolist()
        )

    def report_skipped(self, log: logging.Logger) -> None:
        """Say how often damaged pictures were left out, if there were any."""
        if self._skipped:
            log.warning(
                "%d damaged pictures were left out %d times in all, others of their size took their place",
                len(self._skipped),
                self._skipped.total(),
            )

    def _finished(self, draft: PartialBatch | str) -> Batch:
        if isinstance(draft, str):
            raise UserError(draft)
        for told in draft.skipped:
            if told not in self._skipped:
                logger.warning("%s; it is left out, another picture of its size takes its place", told)
            self._skipped[told] += 1
        return finish_batch(draft, self._latents, self._texts.memory, self._texts.padding)

    def _from_workers(self, orders: Orders, num_workers: int, persistent_workers: bool) -> Iterator[Batch]:
        loader = self._lasting_loader
        if loader is None or loader.num_workers != num_workers:
            self._orders = BatchSampler(orders)
            loader = DataLoader(
                self._maker,
                batch_size=None,
                sampler=self._orders,
                num_workers=num_workers,
                collate_fn=cast("Any", hand_over),
                worker_init_fn=start_worker,
                persistent_workers=persistent_workers,
            )
            self._lasting_loader = loader if persistent_workers else None
        self._orders.orders = orders
        for draft in loader:
            yield self._finished(draft)


def bucket_rules(config: DatasetConfig, spec: LatentSpec) -> BucketRules:
    """The shapes that a dataset's pictures get."""
    return BucketRules.build(
        config.resolution,
        config.enable_bucket,
        config.min_bucket_reso,
        config.max_bucket_reso,
        config.bucket_reso_steps,
        config.bucket_no_upscale,
        spec.bucket_step,
    )


def check_drawing(config: RunDataConfig, options: TrainOptions) -> None:
    """Raise UserError for ways of drawing that exclude each other."""
    is_cached = options.caching.cache_latents or options.caching.cache_latents_to_disk
    for dataset in config.datasets:
        for subset in dataset.subsets:
            if subset.face_crop_aug_range is not None and dataset.enable_bucket:
                raise UserError(
                    f"{subset.source}: face_crop_aug_range cannot be used with enable_bucket; leave one of them out"
                )
            for name in ("random_crop", "color_aug", "face_crop_aug_range"):
                if is_cached and getattr(subset, name):
                    raise UserError(
                        f"{subset.source}: --{name} draws another picture each time and --cache_latents keeps one; "
                        "leave one of them out"
                    )
