"""The batches of a run, built from its data plan and the caches."""

import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader

from library.base.errors import UserError
from library.base.formatting import format_count
from library.data.batches.batches import (
    BatchMaker,
    BatchSampler,
    Orders,
    PartialBatch,
    finish_batch,
    identity_collate,
    start_worker,
)
from library.data.batches.shared import SharedMaker
from library.data.batches.validation_set import ValidationSet, open_validation_set
from library.data.caching.stores import LatentStore, TextStore
from library.data.plan.data_plan import DataPlan
from library.data.plan.order import epoch_batches
from library.data.plan.samples import build_draws
from library.data.plan.validation_split import identities_of_images
from library.types import Batch, StepOf

logger = logging.getLogger(__name__)


class PlannedBatches:
    """Batches as a function of the seed, the epoch and the index. Cached features replace pixels and captions.

    The only state is the worker processes and the count of skipped damaged images.
    """

    def __init__(self, plan: DataPlan, latents: LatentStore, texts: TextStore) -> None:
        self.plan = plan
        self._latents, self._texts = latents, texts
        self._maker = build_batch_maker(plan, latents, texts)
        self._skipped: Counter[str] = Counter()  # number of draws by message about a damaged image
        self._orders = BatchSampler(Orders(1, (), (), int))
        self._lasting_loader: DataLoader[PartialBatch | UserError] | None = None
        self._reading: Generator[Batch, None, None] | None = None  # the epoch being read by workers

    @cached_property
    def validation(self) -> ValidationSet:
        """The held-out images."""
        maker = replace(self._maker, seed=self.plan.validation_seed)
        return open_validation_set(maker, self._finished, self.plan.draws_aside, self.plan.split.identities)

    def measured(self, numbers: Sequence[int], is_mirrored: bool = False) -> ValidationSet:
        """Return some trained samples as a validation set, so that they are measured like held-out images."""
        plan = self.plan
        draws_N = np.zeros_like(plan.samples.draws_N)
        draws_N[list(numbers)] = 1
        samples = plan.samples.changed({}, draws_N)
        datasets = (*plan.split.trained, *plan.split.set_aside)
        draws = build_draws(samples, [dataset.config for dataset in datasets], range(len(plan.datasets)))
        identities = {**plan.split.identities, **identities_of_images(samples[number].image for number in numbers)}
        maker = replace(self._maker, seed=plan.validation_seed, is_mirrored=is_mirrored)
        return open_validation_set(maker, self._finished, draws, identities)

    def iterate_epoch(
        self, epoch: int, batch_indices: Sequence[int], step_of: StepOf, num_workers: int, persistent_workers: bool
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 1) at `batch_indices` (from 0), in their order. No others are read.

        `step_of(i)` is the optimizer step of batch i. With `persistent_workers` the worker processes run until `close`.
        Raises UserError naming an image that cannot be read.
        """
        assert epoch >= 1, epoch
        batches = epoch_batches(self.plan.draws.buckets, self.plan.seed, epoch)
        orders = Orders(epoch, batches, batch_indices, step_of)
        if not self._needs_workers:
            num_workers = 0
        # As in sd-scripts, at most one worker per core. More workers than batches would be idle.
        num_workers = min(num_workers, os.cpu_count() or 1, self.plan.num_batches)
        if num_workers == 0:
            return (self._finished(self._maker[order]) for order in orders)
        self._reading = self._from_workers(orders, num_workers, persistent_workers)
        return self._reading

    def close(self) -> None:
        """End the worker processes, even in the middle of an epoch."""
        # At interpreter exit torch would wait five seconds for each worker, kill it, and report a failure.
        if self._reading is not None:
            self._reading.close()  # it references the loader
        self._reading = self._lasting_loader = None

    def report_skipped(self, log: logging.Logger) -> None:
        """Log how often damaged images were skipped, if any."""
        if self._skipped:
            log.warning(
                "skipped %s (%s); images of the same bucket were used instead",
                format_count(len(self._skipped), "damaged image"),
                format_count(self._skipped.total(), "draw"),
            )

    @cached_property
    def _needs_workers(self) -> bool:
        # Captions alone take less time to make than to send between processes.
        maker = self._maker
        if any(images.masks is not None for images in maker.samples.subsets):
            return True
        return any(
            (number not in maker.in_memory or number in maker.text_files) and number not in maker.damaged
            for number in np.flatnonzero(maker.samples.draws_N).tolist()
        )

    def _finished(self, draft: PartialBatch | UserError) -> Batch:
        if isinstance(draft, UserError):
            raise draft
        for message in draft.skipped:
            if message not in self._skipped:
                logger.warning("%s; skipping it and using another image of its bucket", message)
            self._skipped[message] += 1
        return finish_batch(draft, self._latents.memory, self._texts.memory, self._texts.padding)

    @cached_property
    def _for_workers(self) -> BatchMaker | SharedMaker:
        # A forked worker reads the columns in its parent's memory without a copy.
        return self._maker if multiprocessing.get_start_method() == "fork" else SharedMaker.of(self._maker)

    def _from_workers(self, orders: Orders, num_workers: int, persistent_workers: bool) -> Generator[Batch, None, None]:
        loader = self._lasting_loader
        if loader is None or loader.num_workers != num_workers:
            if multiprocessing.get_start_method() == "forkserver":  # on Linux since Python 3.14
                # The server imports torch once. By default each worker would, in every epoch: 5 s instead of 0.2 s.
                multiprocessing.set_forkserver_preload(["__main__", __name__])
            self._orders = BatchSampler(orders)
            loader = DataLoader(
                self._for_workers,
                # An order is a whole batch already.
                batch_size=None,
                sampler=self._orders,
                num_workers=num_workers,
                collate_fn=cast("Any", identity_collate),
                worker_init_fn=start_worker,
                persistent_workers=persistent_workers,
            )
            self._lasting_loader = loader if persistent_workers else None
        self._orders.orders = orders
        for draft in loader:
            yield self._finished(draft)


def build_batch_maker(plan: DataPlan, latents: LatentStore, texts: TextStore) -> BatchMaker:
    """Build the batch maker of the workers from a plan and the caches."""
    return BatchMaker(
        seed=plan.seed,
        samples=plan.samples,
        sample_of_draw=plan.draws.sample_of_draw,
        subsets=plan.subsets,
        prior_loss_weight=plan.prior_loss_weight,
        max_train_steps=plan.max_train_steps,
        files=latents.files,
        in_memory=frozenset(latents.memory),
        num_variants=plan.num_variants,
        text_files=texts.files,
        damaged=latents.damaged,
        storage=plan.storage,
        has_alpha=plan.spec.has_alpha,
        seen=plan.seen,
        vae=latents.vae,
        unconditional=plan.unconditional if texts.memory else None,
    )
