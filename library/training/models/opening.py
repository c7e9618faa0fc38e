"""Opens the processes, the seed and the data of a run, before any model is loaded."""

import logging
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from library.base.collector import freeze_imports
from library.base.errors import about, error_in
from library.base.json_text import parse_json
from library.base.launcher import restart_count
from library.base.temporary_folders import delete_abandoned_folders
from library.data.batches.own_dataset import open_own_dataset, warn_of_replaced
from library.data.concepts.prompt_pairs import open_prompt_pairs
from library.data.description.schema import RunDataConfig, level_offset
from library.data.plan.data_plan import DataPlan, build_plan
from library.data.training_data import TrainingData
from library.environment.hidden_libraries import hide_library
from library.memory.offload.shared import IN_MEMORY
from library.options.output.trackers import TrackerOptions
from library.options.train import TrainOptions
from library.options.training.network import NetworkOptions
from library.processes.process_group import Processes, register_rendezvous
from library.protocols import Architecture, Objective
from library.training.models.text_caching import TextPlan, check_text_caching, files_that_change_text
from library.training.optimization.optimizers import import_class
from library.training.reporting.trackers import run_folder, tracker_kind
from library.training.saving.state import StateManifest

logger = logging.getLogger(__name__)

NO_TRACKERS = TrackerOptions()
Draw = Callable[[RunDataConfig], None]
"""Draws the missing images of the subsets with a prompt."""

LATENT_PIXELS = 8  # per latent of the U-Nets whose folders state a size
LARGEST_FACTOR = 2.0  # sides beyond it are far from a base model's own; 512 on a model of 1024 px is usual


def delete_leftovers() -> None:
    """Delete what killed runs left: shared weights in memory and latents on disk, tens of gigabytes for a large
    model."""
    delete_abandoned_folders((IN_MEMORY, gettempdir()))


def choose_seed(seed: int | None, processes: Processes, state: StateManifest | None) -> int:
    """Return the given seed, else that of the resumed state, else a random one below 2**32, which is logged."""
    if state is not None:
        if seed not in (None, state.seed):
            logger.warning(
                "--seed was %d in the state and is %d: the run continues, but differs from an uninterrupted one",
                state.seed,
                seed,
            )
        return state.seed if seed is None else seed
    if seed is not None:
        return seed
    seed = int(processes.share("seed", str(secrets.randbelow(2**32))))
    logger.info("no --seed given: using --seed %d", seed)
    return seed


def open_training_data(
    options: TrainOptions,
    arch: Architecture,
    text: TextPlan,
    seed: int,
    num_processes: int,
    draw: Draw | None,
    revisions: Mapping[str, str],
) -> TrainingData:
    """Open prompts to train on, the user's dataset class, or the described images, of which `draw` draws those of
    subsets with a prompt; log what was found. `revisions` are the commits of data sets of the hub in a state."""
    if options.concepts is not None:
        require_no_text_changes(options.network)
        return open_prompt_pairs(options.concepts, options.run, arch, seed, num_processes)
    name = options.dataset.dataset_class
    if name is None:
        return open_data_plan(options, arch, text, seed, num_processes, draw, revisions)
    cls = import_class(name, "--dataset_class", name)
    warn_of_replaced(options.flat())
    dataset = open_own_dataset(cls, options.dataset, options.model.max_token_length, arch.codec.spec, seed)
    dataset.audit(logger)
    return dataset


def require_no_text_changes(options: NetworkOptions) -> None:
    """Raise UserError for adapters to merge that change a text encoder, because prompts are encoded before the
    merge."""
    for file, changed in files_that_change_text(options):
        raise about("--base_weights")(
            f"{file} changes the text encoder ({changed} and others), which encodes the prompts before anything is "
            "merged",
            "merge the file into the base model with tools/merge_lora.py first",
        )


def open_data_plan(
    options: TrainOptions,
    arch: Architecture,
    text: TextPlan,
    seed: int,
    num_processes: int,
    draw: Draw | None = None,
    revisions: Mapping[str, str] | None = None,
) -> DataPlan:
    """Read the dataset description and the image headers, and log what was found."""
    check_text_caching(options.network, arch.text_cache, text)
    spec, count_tokens, max_tokens = arch.codec.spec, arch.text.count_tokens, arch.text.max_tokens
    plan = build_plan(
        options, spec, seed, count_tokens, max_tokens, num_processes, draw=draw, revisions=revisions or {}
    )
    if text.cached is not None:
        plan = plan.with_fixed_captions(text.cached.options.text_cache_variants)
        if options.guidance.guidance_scale_of_loss is not None:
            plan = replace(plan, unconditional=options.guidance.guidance_loss_caption)
    if arch.text_cache is not None and arch.text_cache.sees_images and plan.has_references:
        if text.cached is None:
            raise error_in("--cache_text_encoder_outputs", cause="needs")(
                "the text encoder of this base model sees the reference images of the data set, for which its "
                "outputs must be cached",
                "add --cache_text_encoder_outputs",
            )
        plan = plan.with_seen_references()
    plan.audit(logger)
    sides = native_sides(arch.metadata, options.model.pretrained_model_name_or_path)
    for line in (*idle_offsets(plan.config, arch.objective), *far_resolutions(plan.config, sides)):
        logger.warning("%s", line)
    return plan


def native_sides(metadata: Mapping[str, str], base: str | None) -> list[int]:
    """Return the sides in pixels that a base model is known to be trained at: its family's, then those that a diffusers
    folder states."""
    recorded = re.match(r"[1-9]\d{0,4}(?!\d)", metadata.get("modelspec.resolution", ""))
    sides = [int(recorded[0])] if recorded else []
    if base is None:
        return sides
    for part, pixels in (("unet", LATENT_PIXELS), ("vae", 1)):
        try:
            config = parse_json((Path(base) / part / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        side = config.get("sample_size") if isinstance(config, dict) else None
        sides += [side * pixels] if type(side) is int and side > 0 else []
    return sides


def far_resolutions(config: RunDataConfig, sides: Sequence[int]) -> Iterator[str]:
    """Yield a line if every data set has far more or fewer pixels than the base model was trained at, by `sides`."""
    trained = [math.sqrt(math.prod(dataset.resolution)) for dataset in config.datasets]
    factors = [max(side / own, own / side) for side in trained for own in sides]
    if factors and min(factors) > LARGEST_FACTOR:
        sizes = ", ".join(dict.fromkeys("{}x{}".format(*dataset.resolution) for dataset in config.datasets))
        yield (
            f"resolution is {sizes}, but this base model is trained at {sides[0]}x{sides[0]}; so far from it an "
            f"adapter learns the base model's faults at that size; use about {sides[0]}"
        )


def idle_offsets(config: RunDataConfig, objective: Objective) -> Iterator[str]:
    """Yield a line for every subset whose timestep_sampling.offset has no effect."""
    if objective.takes_offset:
        return
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        if level_offset(subset.custom_attributes):
            yield (
                f"timestep_sampling.offset of {subset.source} has no effect: no normal value that it could move is "
                "behind the noise levels; flow models have one with --timestep_sampling sigmoid and shift, and with "
                "--weighting_scheme logit_normal"
            )


def open_accelerator(
    mixed_precision: str, trackers: TrackerOptions = NO_TRACKERS, timeout_minutes: int | None = None
) -> Any:
    """Build accelerate's Accelerator."""
    with freeze_imports("accelerate"), hide_library("boto3"):  # accelerate imports boto3 for Amazon's SageMaker
        from accelerate import Accelerator, InitProcessGroupKwargs

    # After a restart the launcher's store still holds the addresses of the dead processes, for which torch would wait.
    group_kwargs = InitProcessGroupKwargs(
        timeout=timedelta(minutes=timeout_minutes) if timeout_minutes else None,
        init_method=register_rendezvous() if restart_count() else None,
    )
    return Accelerator(
        mixed_precision=mixed_precision,
        log_with=tracker_kind(trackers),
        project_dir=run_folder(trackers),
        kwargs_handlers=[group_kwargs],
    )
