"""Builds a run in stages, each of which returns a small frozen value, in the order of their dependencies."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from library.checkpoints.weights import to_meta_device
from library.data.training_data import TrainingData, open_batches
from library.errors import needing
from library.memory.planner.measured import measure_peak_flops
from library.processes import Processes
from library.protocols import Architecture
from library.training.evaluation.drawing import collect_texts
from library.training.evaluation.image_scores import read_scorer
from library.training.evaluation.preview import read_wanted_prompts
from library.training.evaluation.untaught_words import caption_texts, describe_untaught, find_untaught_words
from library.training.loop.adapter_run import PreparedRun
from library.training.models.arithmetic import check_arithmetic
from library.training.models.base_model import load_models
from library.training.models.block_running import choose_block_runner
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import attach_training_adapter
from library.training.models.frozen_base import check_base, resolve_base
from library.training.models.network import open_network
from library.training.models.preflight import preflight
from library.training.models.requests import RequestedRun
from library.training.reporting.console_lines import ImageCounts, announce_run
from library.training.reporting.log_prefix import log_prefix
from library.training.reporting.progress import Progress
from library.training.reporting.step_times import StepTimes
from library.training.reporting.trackers import Charts, loggable_options, start_trackers
from library.training.run.run_events import build_plan_event
from library.training.run.runs import Shared, build_run, prepare_run
from library.training.saving.checkpoints import save_dtype
from library.training.saving.resume import check_latents, resolve_starting_steps
from library.training.saving.state import network_shapes
from library.training.step.accumulation import Plan
from library.training.sweep_record import SweepRecord
from library.types import Prompt
from networks.core.protocol import multiplex

logger = logging.getLogger(__name__)


def prepare(
    requested: RequestedRun,
    seed: int,
    data: TrainingData,
    accelerator: Any,
    processes: Processes,
    sweep: SweepRecord | None = None,
) -> list[PreparedRun]:
    """Load the models, attach the adapters, build their optimizers and restore their states.

    `seed` is shared by all adapters. Raises UserError for settings that can only be checked here, such as a network
    argument.
    """
    options, adapters, arch, formats = requested.options, requested.adapters, requested.arch, requested.formats
    # Raises for a wrong value, which would otherwise be noticed only once everything is loaded and cached.
    save_dtype(options.saving.save_precision)
    require_same_data(data, processes)
    compute = Compute.build(options.precision, processes.device)
    plan = Plan.build(options.run, data.num_batches, processes.count)
    first_steps = resolve_starting_steps(
        [(a.options.state, a.names.of_end(), a.state) for a in adapters if a.names is not None], plan
    )
    for adapter in adapters:
        if adapter.state is not None and data.prompts is None:
            check_latents(adapter.state, arch.codec.spec.computed_as)
    module = adapters[0].module  # also reads the adapters that are merged into the base model
    # Check what needs no weights before reading them and encoding images, which takes minutes.
    check_base(options.precision, options.memory, arch)
    if options.precision.multiplies_codes:
        check_arithmetic(formats.denoiser, module, arch, compute)
    preflight(adapters, arch, plan.max_train_steps)
    prompts = read_wanted_prompts(options.preview, arch) if processes.is_main else []
    if prompts:
        with needing("--sample_prompts draws images; give the VAE, or leave it out"):
            # Reads the header of the file only, which is enough to notice that there is none.
            to_meta_device(arch.load).vae()
        warn_of_untaught_words(prompts, data, arch)
    scorer = read_scorer(options.preview, data.image_plan) if prompts else None
    texts = collect_texts(prompts, arch)
    loaded = load_models(options, formats, requested.text, arch, seed, data, compute, texts, processes, module)
    resolve_base(options.precision, formats, options.memory, arch, loaded.models, compute, processes)
    # After the base model has its weight formats and devices: a network module may read the weights that it adapts.
    models = attach_training_adapter(options.network, arch, loaded.models, compute.device)
    loaded, networks = replace(loaded, models=models), []
    for adapter in adapters:
        with log_prefix(adapter.label):
            network = open_network(adapter, loaded.models, compute)
            if adapter.state is not None:
                network.prepare_for(network_shapes(adapter.state), str(adapter.state.path))
            networks.append(network)
    multiplexer = None
    if len(networks) > 1:
        multiplexer = multiplex(networks, module.name)
        share = None if data.prompts is not None else multiplexer.share_stacked(range(len(networks)))
        logger.info("%s", format_sharing(len(networks), share))
    # After all adapters are attached, because blocks are compiled with them.
    choose_block_runner(options.memory, options.compiling, options.trains_text_encoders, arch, loaded.models, networks)
    times = StepTimes(compute.device, processes.count, measure_peak_flops(compute.device, compute.dtype))
    # After everything that encodes has left memory: the batches take latents and features from the finished caches.
    batches = open_batches(data, loaded.latents, loaded.texts)
    shared = Shared(arch, loaded, compute, processes, data, batches, plan, times, multiplexer, sweep)
    charts = Charts(accelerator)
    prepared = []
    for index, (adapter, network, first_step) in enumerate(zip(adapters, networks, first_steps, strict=True)):
        with log_prefix(adapter.label):
            run = build_run(adapter, network, shared, index)
            prepared.append(prepare_run(run, adapter, Progress(first_step), charts, prompts, loaded.prompts, scorer))
    if processes.is_main:
        start_trackers(accelerator, options.trackers, loggable_options(options))
        num_validation = prepared[0].validation.num_images
        counts = ImageCounts(data.num_train_images, num_validation, data.num_reg_images)
        announce_run(plan, counts, data.batch_sizes, options.run.gradient_accumulation_steps)
        for adapter, prepared_run in zip(adapters, prepared, strict=True):
            resumed_from = None if adapter.state is None else str(adapter.state.path)
            adapter.events.emit(build_plan_event(prepared_run.run, counts, prepared_run.progress.step, resumed_from))
    return prepared


def warn_of_untaught_words(prompts: Sequence[Prompt], data: TrainingData, arch: Architecture) -> None:
    """Warn about words that every preview prompt has and no caption, such as a misspelt trigger word."""
    if data.image_plan is None:
        return
    captions = caption_texts(data.image_plan)
    words = find_untaught_words([prompt.text for prompt in prompts], captions, arch.text.count_tokens)
    if words:
        logger.warning("%s", describe_untaught(words))


def format_sharing(count: int, share: float | None) -> str:
    """Describe how `count` adapters compute. `share` is the fraction of layers that run them in one product; None if
    each adapter draws its own latents from prompts."""
    if share is None:
        return f"{count} adapters share the base model and train one after another, each on latents that it draws"
    if share == 1:
        return f"{count} adapters share each pass of the base model; every layer computes them in one product"
    return (
        f"{count} adapters share each pass of the base model; {1 - share:.0%} of its adapted layers compute them one "
        "after another: kinds other than LoRA, DoRA per input, LoRA-FA and DyLoRA, kernels larger than 1x1, adapters "
        "with dropout, and layers that not all of them adapt"
    )


def require_same_data(data: TrainingData, processes: Processes) -> None:
    """Raise UserError if processes found different images, because their shares of an epoch would not match."""
    if processes.count > 1:
        identity = data.identity
        size = f"{identity['num_pictures']} images in {identity['num_batches']} batches"
        processes.require_same(
            "the dataset", f"{size} ({identity['pictures']}, {identity['captions']}, {identity['settings']})"
        )
