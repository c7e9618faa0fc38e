"""Validation losses of adapter files, measured as in a run; the base model is loaded once.

Letters: N images, L noise levels.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from library.base.errors import error_in
from library.checkpoints.recognition import keys_of_text_encoders
from library.data.batches.planned import PlannedBatches
from library.data.batches.validation_set import ValidationSet
from library.data.caching.stores import NO_LATENTS, NO_TEXTS
from library.data.plan.data_plan import DataPlan
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.training.evaluation.measurement import Measurement
from library.training.evaluation.validation import resolve_measurements
from library.training.models.base_model import load_models
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import READER, attach_training_adapter
from library.training.models.step_context import step_context
from library.training.models.text_caching import TextPlan
from library.training.models.weight_formats import BaseFormats
from library.training.offline.adapter_files import Row, install_adapters, resolve_models
from networks.core.protocol import open_network_module

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=TrainOptions)

MOST_MIRRORED = 64  # images, if none are held out


@dataclass(frozen=True)
class Sides:
    """The measurements of every file; None where there is nothing to measure."""

    held_out: Measurement | None
    trained: Measurement | None
    mirrored: Measurement | None  # the training images, if none are held out
    probe: Measurement | None = None  # the images of subsets with is_forgetting_probe


@dataclass(frozen=True)
class FileLosses:
    """A file's losses, shape NL, for each available measurement."""

    row: Row
    held_out_NL: Tensor | None
    trained_NL: Tensor | None
    mirrored_NL: Tensor | None
    probe_NL: Tensor | None


def adjust_for_measuring(options: OptionsT) -> OptionsT:
    """Keep text encoder outputs in memory.

    Training images are measured with other versions of their captions than training draws, which must not replace
    cached ones on disk.
    """
    on_disk = "cache_text_encoder_outputs_to_disk"
    if not options.flat().get(on_disk):
        return options
    return options.with_values({on_disk: False, "cache_text_encoder_outputs": True})


def losses_of_files(
    options: TrainOptions,
    text: TextPlan,
    arch: Architecture,
    plan: DataPlan,
    seed: int,
    rows: Sequence[Row],
    device: torch.device,
    others: Sequence[Architecture] = (),
    measures_trained: bool = True,
) -> tuple[Sides, Iterator[FileLosses]]:
    """Return the measurements and an iterator over each file's losses, on as many training images as unseen ones, or
    on unseen ones alone. `others` are the same base model with other objectives, for which each file's losses follow.

    Raises UserError for a file that does not fit.
    """
    # Resolved twice: the first time only to learn which images are held out. Those, and as many trained ones, are then
    # encoded and measured.
    uncached = PlannedBatches(plan, NO_LATENTS, NO_TEXTS)
    held_out, probe = resolve_measurements(options.validation, options.noise, uncached.validation, seed)
    has_flips = any(s.config.flip_aug for dataset in plan.datasets for s in dataset.subsets)
    held_out_samples = {
        sample for part in (held_out, probe) for sample in part.images.iterate_samples(part.batch_indices)
    }
    are_mirrored = not held_out.rows and not has_flips
    count = count_trained(len(held_out.rows), measures_trained)
    plan, indices = plan.limited_to_measured(count, held_out_samples, are_mirrored)
    if not held_out.rows:  # mirrored images have no cached latents
        in_memory = replace(options.caching, cache_latents=False, cache_latents_to_disk=False)
        options = replace(options, caching=in_memory)
    compute, processes = Compute.build(options.precision, device), replace(ALONE, device=device)
    formats, reader = BaseFormats.load(options.precision), open_network_module(READER)
    loaded = load_models(options, formats, text, arch, seed, plan, compute, (), processes, reader)
    if not loaded.models.text_encoders:
        check_text_parts(rows)
    resolve_models(options.precision, formats, options.memory, arch, loaded.models, compute)
    loaded = replace(loaded, models=attach_training_adapter(options.network, arch, loaded.models, device))
    batches = PlannedBatches(plan, loaded.latents, loaded.texts)
    held_out, probe = resolve_measurements(options.validation, arch.objective.noise, batches.validation, seed)
    trained = select_all(batches.measured(indices), held_out)
    if held_out.rows:
        # Both groups are measured with the same noise, so that only their images differ.
        measurements = Sides(held_out, replace(trained, noise=held_out.rows) if count else None, None)
    elif has_flips:
        logger.warning("trained images are not compared with their mirror images: --flip_aug trained these too")
        measurements = Sides(None, trained, None)
    else:
        measurements = Sides(None, trained, select_all(batches.measured(indices, is_mirrored=True), held_out))
    measurements = replace(measurements, probe=probe if probe.rows else None)
    num_threads = options.dataset.max_data_loader_n_workers

    def measure_files() -> Iterator[FileLosses]:
        for row in rows:
            name = "the base model" if row is None else row.name
            with (
                torch.no_grad(),
                install_adapters([] if row is None else [(row, 1.0)], loaded.models, compute, arch) as network,
            ):
                for each in (arch, *others):
                    context = step_context(
                        options.trains_text_encoders, options.caching.vae_batch_size, each, seed, loaded, network,
                        compute, options.pairs, options.guidance,
                    )  # fmt: skip
                    title = f"measuring {name}"
                    yield FileLosses(
                        row,
                        *(
                            None if one is None else one.losses(context, processes, num_threads, title)
                            for one in (
                                measurements.held_out,
                                measurements.trained,
                                measurements.mirrored,
                                measurements.probe,
                            )
                        ),
                    )

    return measurements, measure_files()


def count_trained(num_held_out: int, are_wanted: bool) -> int:
    """Return the number of trained images to measure: as many as are held out, or many without these."""
    return MOST_MIRRORED if not num_held_out else num_held_out if are_wanted else 0


def select_all(images: ValidationSet, like: Measurement) -> Measurement:
    """Return a measurement of all of these images, with the noise levels and the seed of another one."""
    return replace(like, images=images, batch_indices=images.select_batches(None))


def check_text_parts(rows: Sequence[Row]) -> None:
    """Raise UserError for a file that changes text encoders, which are unloaded."""
    for row in rows:
        if row is not None and keys_of_text_encoders(row):
            raise error_in("--cache_text_encoder_outputs", cause="does not fit")(
                f"{row} changes the text encoders, whose outputs --cache_text_encoder_outputs takes without it",
                "leave that option out",
            )
