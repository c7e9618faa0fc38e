"""Puts a run together, in stages that each give a small frozen value; the order is the order of what needs what."""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from torch import nn

from library.checkpoints.weights import without_values
from library.data.batches.own_dataset import open_own_dataset
from library.data.batches.training_data import TrainingBatches, TrainingData, open_batches
from library.data.description.plan import DataPlan, build_plan
from library.data.description.schema import RunDataConfig, level_offset
from library.errors import needing
from library.launcher import restart_count
from library.memory.planner.cards import peak_of
from library.options.train import TrainOptions
from library.processes import Processes, way_to_meet
from library.protocols import Architecture, Objective
from library.training.evaluation.eval_mode import eval_mode
from library.training.evaluation.preview import Previews, texts_of, wanted_prompts
from library.training.evaluation.validation import Validation
from library.training.optimization.optimizers import import_class
from library.training.reporting.event_stream import Events
from library.training.reporting.logs import Charts, run_folder, start_trackers, tracker_kind
from library.training.reporting.progress import Progress
from library.training.reporting.report import PictureCounts, announce_run
from library.training.reporting.speaking import speaking_of
from library.training.reporting.step_times import StepTimes
from library.training.run.conditioning import CaptionMemo
from library.training.run.context import Autocast, StepContext
from library.training.run.events import plan_of
from library.training.run.plan import Plan
from library.training.run.run import Run
from library.training.run.sharding import preserves_in_step
from library.training.run.told_steps import NormMeter
from library.training.saving.checkpoints import Writer, save_dtype
from library.training.saving.resume import starting_steps
from library.training.saving.state import StateManifest
from library.training.setup.adapter import attach_adapter, choose_block_runner, trains_text_encoders
from library.training.setup.arithmetic import check_arithmetic
from library.training.setup.compute import Compute
from library.training.setup.frozen_base import check_base, settle_base
from library.training.setup.graphs import check_graphs, fixed_steps
from library.training.setup.models import LoadedModels, load_models
from library.training.setup.optimization import build_optimization
from library.training.setup.rehearsal import rehearse
from library.training.setup.text_caching import cached_text, check_text_caching
from library.training.setup.writer import build_writer, go_on
from library.training.sweep.record import SweepRecord
from library.types import Conditioning, Prompt, Tokens
from networks.core.protocol import AdoptedNetwork, Turns, side_by_side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """One adapter that the run is to train; several of them share the base model and the batches (--sweep)."""

    options: TrainOptions  # of its run alone
    seed: int  # of the adapter, its noise and its dropout
    state: StateManifest | None  # that it goes on from
    events: Events
    label: str = ""  # what it is called where there are others


@dataclass(frozen=True)
class Prepared:
    """One adapter that is ready to be trained."""

    run: Run
    progress: Progress
    writer: Writer
    charts: Charts
    previews: Previews
    validation: Validation
    resumed: StateManifest | None  # the state, if the run goes on at its step


def wanted(options: TrainOptions, seed: int, state: StateManifest | None, events: Events, label: str = "") -> Wanted:
    """An adapter of a run with this seed, which is its own too unless --sweep gives it another one.

    All adapters are measured with the noise of the run's seed.
    """
    own = options.run.seed if label and options.run.seed is not None else seed
    if own != seed and options.validation.validation_seed is None:
        options = options.with_values({"validation_seed": seed})
    return Wanted(options, own, state, events, label)


def choose_seed(seed: int | None, processes: Processes, state: StateManifest | None) -> int:
    """--seed, else that of the resumed state, else a random one below 2**32, which the log names, for all processes."""
    if state is not None:
        if seed not in (None, state.seed):
            logger.warning(
                "--seed was %d in the state and is %d: the run goes on, but not as the uninterrupted one would have",
                state.seed,
                seed,
            )
        return state.seed if seed is None else seed
    if seed is not None:
        return seed
    seed = processes.share_seed(secrets.randbelow(2**32))
    logger.info("no --seed given: using --seed %d", seed)
    return seed


def open_training_data(options: TrainOptions, arch: Architecture, seed: int, num_processes: int) -> TrainingData:
    """The class of --dataset_class, else the pictures that are described; logs what was found."""
    name = options.dataset.dataset_class
    if name is None:
        return open_data_plan(options, arch, seed, num_processes)
    own = open_own_dataset(import_class(name, "--dataset_class", name), options, arch.codec.spec, seed)
    own.audit(logger)
    return own


def open_data_plan(options: TrainOptions, arch: Architecture, seed: int, num_processes: int) -> DataPlan:
    """Read the dataset description and the pictures' headers, and log what was found."""
    text, cached = arch.text, cached_text(options, arch.text_cache)
    check_text_caching(options, arch.text_cache)
    plan = build_plan(options, arch.codec.spec, seed, text.count_tokens, text.max_tokens, num_processes)
    if cached is not None:
        plan = plan.with_fixed_captions(cached.options.text_cache_variants)
    plan.audit(logger)
    for line in idle_offsets(plan.config, arch.objective):
        logger.warning("%s", line)
    return plan


def idle_offsets(config: RunDataConfig, objective: Objective) -> Iterator[str]:
    """A line for every subset whose timestep_sampling.offset moves nothing."""
    if objective.takes_offset:
        return
    for subset in (subset for dataset in config.datasets for subset in dataset.subsets):
        if level_offset(subset.custom_attributes):
            yield (
                f"timestep_sampling.offset of {subset.source} has no effect: no normal value that it could move is "
                "behind the noise levels; flow models have one with --timestep_sampling sigmoid and shift, and with "
                "--weighting_scheme logit_normal"
            )


def open_accelerator(options: TrainOptions) -> Any:
    """accelerate's view of the device, the processes and the trackers."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    minutes = options.distributed.ddp_timeout
    limits = InitProcessGroupKwargs(
        timeout=timedelta(minutes=minutes) if minutes else None,
        init_method=way_to_meet() if restart_count() else None,
    )
    return Accelerator(
        mixed_precision=options.precision.mixed_precision,
        log_with=tracker_kind(options.trackers),
        project_dir=run_folder(options.trackers),
        kwargs_handlers=[limits],
    )


def prepare(
    options: TrainOptions,
    arch: Architecture,
    seed: int,
    data: TrainingData,
    accelerator: Any,
    processes: Processes,
    adapters: Sequence[Wanted],
    sweep: SweepRecord | None = None,
) -> list[Prepared]:
    """Load the models, attach the adapters, build what moves each of them, and put each where its state left it.

    `options` and `seed` are those of what all `adapters` share: pictures, base model, plan. Raises UserError for
    settings that only show here to be wrong, such as a network argument.
    """
    save_dtype(options.saving.save_precision)
    require_same_data(data, processes)
    compute = Compute.build(options.precision, processes.device)
    plan = Plan.build(options.run, data.num_batches, processes.count)
    first_steps = starting_steps([one.options for one in adapters], plan, [one.state for one in adapters])
    check_base(options, arch)
    check_graphs(options, arch, compute.device, processes)
    check_arithmetic(options, arch, compute)
    for one in adapters:
        rehearse(one.options, arch, plan.max_train_steps)
    prompts = wanted_prompts(options, arch) if processes.is_main else []
    if prompts:
        with needing("--sample_prompts draws pictures"):
            without_values(arch.load).vae()
    texts = texts_of(prompts, arch.preview.worded)
    reader = options.network.network_module or ""
    loaded = load_models(options, arch, seed, data, compute, texts, processes, reader)
    settle_base(options, arch, loaded.models, compute, processes)
    networks = []
    for one in adapters:
        with speaking_of(one.label):
            networks.append(attach_adapter(one.options, one.seed, loaded.models, compute))
    turns = None
    if len(networks) > 1:
        turns = side_by_side(networks, options.network.network_module or "")
        logger.info("%s", told_turns(len(networks), turns.share_stacked(range(len(networks)))))
    choose_block_runner(options, arch, loaded.models, networks)
    times = StepTimes(compute.device, processes.count, peak_of(compute.device, compute.dtype))
    batches = open_batches(data, loaded.latents, loaded.texts)
    shared = Shared(arch, loaded, compute, processes, data, batches, plan, times, turns, sweep)
    charts = Charts(accelerator)
    prepared = []
    for place, (one, network, first_step) in enumerate(zip(adapters, networks, first_steps, strict=True)):
        with speaking_of(one.label):
            run = run_of(one, network, shared, place)
            prepared.append(ready_to_start(run, one, Progress(first_step), charts, prompts, loaded.prompts))
    if processes.is_main:
        start_trackers(accelerator, options)
        counts = counts_of(prepared[0])
        announce_run(plan, counts, data.batch_sizes, options.run.gradient_accumulation_steps)
        for one, ready in zip(adapters, prepared, strict=True):
            resumed_from = None if one.state is None else str(one.state.path)
            one.events.emit(plan_of(ready.run, counts, ready.progress.step, resumed_from))
    return prepared


def told_turns(count: int, share: float) -> str:
    """How `count` adapters compute, where a `share` of the layers has them in one product."""
    if share == 1:
        return f"{count} adapters share each pass of the base model; every layer computes them in one product"
    return (
        f"{count} adapters share each pass of the base model; {1 - share:.0%} of its adapted layers compute them one "
        "after another: kinds other than LoRA, DoRA, LoRA-FA and DyLoRA, kernels larger than 1x1, adapters with "
        "dropout, and layers that not all of them adapt"
    )


@dataclass(frozen=True)
class Shared:
    """What all adapters of a run have in common."""

    arch: Architecture
    loaded: LoadedModels
    compute: Compute
    processes: Processes
    data: TrainingData
    batches: TrainingBatches
    plan: Plan
    times: StepTimes
    turns: Turns | None  # None where there is one adapter
    sweep: SweepRecord | None


def run_of(wanted: Wanted, network: AdoptedNetwork, shared: Shared, place: int) -> Run:
    """The run of one adapter, the one at `place` among all."""
    options, arch, compute = wanted.options, shared.arch, shared.compute
    models = shared.loaded.models
    optimization = build_optimization(options, network, models, shared.plan.max_train_steps, compute.device)
    alone = nullcontext if shared.turns is None else partial(shared.turns.only, place)
    context = step_context(options, arch, wanted.seed, shared.loaded, network, compute, alone)
    context = replace(context, preserves_in_step=preserves_in_step(shared.data, models.spread))
    return Run(
        options=options,
        processes=shared.processes,
        data=shared.data,
        batches=shared.batches,
        plan=shared.plan,
        context=context,
        optimization=optimization,
        times=shared.times,
        events=wanted.events,
        norms=NormMeter(wanted.events.is_on),
        fixed=fixed_steps(options, context, optimization.optimizer),
        label=wanted.label,
        place=place,
        turns=shared.turns,
        sweep=shared.sweep,
    )


def ready_to_start(
    run: Run,
    wanted: Wanted,
    progress: Progress,
    charts: Charts,
    prompts: Sequence[Prompt],
    encoded: Mapping[str, Conditioning] | None,
) -> Prepared:
    """One adapter with everything that writes, draws and measures, where its state left it."""
    state = wanted.state
    charts = charts.named(run.label)
    validation = Validation(run, charts)
    writer = build_writer(run, progress, validation)
    if not run.options.faults.dry_run:
        writer.check_space()
    if state is not None:  # after everything that has a memory is there, and before anything is drawn or measured
        go_on(run, progress, validation, state)
    is_drawing = run.processes.share(f"are there previews {run.label}", "yes" if prompts else "no") == "yes"
    previews = Previews.build(run, charts, prompts, encoded, is_drawing)
    resumed = state if state is not None and state.step == progress.step else None
    return Prepared(run, progress, writer, charts, previews, validation, resumed)


def counts_of(prepared: Prepared) -> PictureCounts:
    data = prepared.run.data
    return PictureCounts(data.num_train_images, prepared.validation.num_pictures, data.num_reg_images)


def require_same_data(data: TrainingData, processes: Processes) -> None:
    """Raise UserError where processes found different pictures: each would train its share of another epoch."""
    if processes.count > 1:
        found = data.identity
        size = f"{found['num_pictures']} pictures in {found['num_batches']} batches"
        processes.require_same("the dataset", f"{size} ({found['pictures']}, {found['captions']}, {found['settings']})")


def step_context(
    options: TrainOptions,
    arch: Architecture,
    seed: int,
    loaded: LoadedModels,
    network: AdoptedNetwork,
    compute: Compute,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepContext:
    encoders, live = loaded.models.text_encoders, loaded.live_text
    encode = arch.text.encode if live is None else live.encode

    def encode_captions(captions: Sequence[str]) -> Conditioning:
        with alone():
            return encode_frozen(encode, encoders, network, compute.autocast, arch.text.tokenize(captions))

    return StepContext(
        arch=replace(arch, objective=arch.objective.on(compute.device)),
        models=loaded.models,
        network=network,
        seed=seed,
        device=compute.device,
        autocast=compute.autocast,
        trains_text_encoder=trains_text_encoders(options),
        captions=CaptionMemo(encode_captions, arch.text_cache.padding if arch.text_cache else {}),
        live_text=live,
        vae_batch_size=options.caching.vae_batch_size,
        alone=alone,
    )


def encode_frozen(
    encode: Callable[[Sequence[nn.Module], Tokens], Conditioning],
    text_encoders: Sequence[nn.Module],
    network: AdoptedNetwork,
    autocast: Autocast,
    tokens: Tokens,
) -> Conditioning:
    """What frozen text encoders make of captions, adapters that do not train included, their dropout off."""
    assert text_encoders, "the text encoders have left memory, batches carry their cached outputs"
    with eval_mode([network.module]), autocast():
        return encode(text_encoders, tokens)
