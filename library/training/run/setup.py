"""Puts a run together: data, models, adapter, optimizer; each model is loaded only when it is needed."""

import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.metadata import RunFacts, base_file_metadata, training_metadata
from library.data.batches.dataset import TrainingSet
from library.data.caching.latents import cache_latents
from library.memory.blocks import plain, recompute, run_encoder_layers_with
from library.memory.devices import DTYPES, place, release_memory
from library.options.train import TrainOptions
from library.processes import Processes
from library.protocols import Architecture
from library.randomness import stream_seed
from library.training.evaluation.eval_mode import eval_mode
from library.training.evaluation.preview import Previews, texts_of, wanted_prompts
from library.training.evaluation.validation import Validation
from library.training.optimization.lr_schedules import base_rates, build_schedule, follow_rates
from library.training.optimization.optimizers import build_optimizer
from library.training.reporting.logs import Charts, run_folder, start_trackers, tracker_kind
from library.training.reporting.progress import Part, Progress
from library.training.reporting.report import PictureCounts, announce_run
from library.training.run.conditioning import CaptionMemo
from library.training.run.network import network_keywords, open_network
from library.training.run.plan import Plan
from library.training.run.run import Autocast, Models, Run
from library.training.run.text_caching import cached_text, check_text_caching, live_text, prepare_text
from library.training.saving.checkpoints import Names, Schedule, Writer, save_dtype
from library.training.saving.hub import Uploads
from library.training.saving.rescue import bytes_of_tensors
from library.training.saving.resume import recorded_options, report_differences, starting_step
from library.training.saving.state import Facts, Keeper, OptimizerKeeper, restore, save_state
from library.types import Conditioning, Tokens
from networks.core.protocol import AdoptedNetwork

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    run: Run
    progress: Progress
    writer: Writer
    charts: Charts
    previews: Previews
    validation: Validation
    resumed: Facts | None  # the state, if the run goes on at its step


def choose_seed(seed: int | None, processes: Processes, facts: Facts | None) -> int:
    """--seed, else that of the resumed state, else a random one below 2**32, which the log names, for all processes."""
    if facts is not None:
        if seed not in (None, facts.seed):
            logger.warning(
                "--seed was %d in the state and is %d: the run goes on, but not as the uninterrupted one would have",
                facts.seed,
                seed,
            )
        return facts.seed if seed is None else seed
    if seed is not None:
        return seed
    seed = processes.share_seed(secrets.randbelow(2**32))
    logger.info("no --seed given: using --seed %d", seed)
    return seed


def open_training_set(options: TrainOptions, arch: Architecture, seed: int, num_processes: int) -> TrainingSet:
    """Read the dataset description and the pictures' headers, and log what was found."""
    text, cached = arch.text, cached_text(options, arch.text_cache)
    check_text_caching(options, arch.text_cache)
    training_set = TrainingSet.build(options, arch.codec.spec, seed, text.count_tokens, text.max_tokens, num_processes)
    if cached is not None:
        training_set.fix_captions(cached.options.text_cache_variants)
    training_set.audit(logger)
    return training_set


def open_accelerator(options: TrainOptions) -> Any:
    """accelerate's view of the device, the processes and the trackers."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    minutes = options.distributed.ddp_timeout
    limits = [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))] if minutes else []
    return Accelerator(
        mixed_precision=options.precision.mixed_precision,
        log_with=tracker_kind(options.trackers),
        project_dir=run_folder(options.trackers),
        kwargs_handlers=limits,
    )


def prepare(
    options: TrainOptions,
    arch: Architecture,
    seed: int,
    training_set: TrainingSet,
    accelerator: Any,
    processes: Processes,
    facts: Facts | None,
) -> Prepared:
    """Load the models, cache what is to be cached, build the adapter and the optimizer.

    Raises UserError for settings that only show here to be wrong, such as a network argument.
    """
    save_dtype(options.saving.save_precision)
    if processes.count > 1:
        data = training_set.identity
        size = f"{data['num_pictures']} pictures in {data['num_batches']} batches"
        processes.require_same("the dataset", f"{size} ({data['pictures']}, {data['captions']}, {data['settings']})")
    device = processes.device
    dtype = DTYPES[options.precision.mixed_precision]
    autocast: Autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype)

    plan = Plan.build(options.run, training_set.num_batches, processes.count)
    progress = Progress(starting_step(options, plan, facts))
    prompts = wanted_prompts(options, arch) if processes.is_main else []

    vae = prepare_vae(options, arch, seed, training_set, processes)
    release_memory(options.memory.highvram)
    text = prepare_text(
        options, arch, training_set, device, autocast, texts_of(prompts, arch.preview.worded), processes
    )
    release_memory(options.memory.highvram)
    text_encoders, live = text.encoders, live_text(options, arch.text_cache)
    encode = arch.text.encode if live is None else live.encode
    denoiser = arch.load.denoiser() if options.precision.shrinks_denoiser else place(arch.load.denoiser(), device)
    models = Models(denoiser, text_encoders, vae, arch.view(text_encoders, denoiser))

    torch.manual_seed(stream_seed(seed, "adapter"))
    network = open_network(options, models, device, dtype)
    trains_text_encoder = trains_text_encoders(options)
    choose_block_runner(options, arch, models, network, trains_text_encoder)

    groups, names = network.parameter_groups(
        options.network.text_encoder_lr, options.network.unet_lr, options.optimizer.learning_rate
    )
    optimizer = build_optimizer(options.optimizer, groups)
    schedule = build_schedule(options.schedule, optimizer, plan.max_train_steps)
    network.prepare_gradients(*models.network_view)

    run = Run(
        options=options,
        arch=arch,
        seed=seed,
        device=device,
        autocast=autocast,
        processes=processes,
        training_set=training_set,
        plan=plan,
        models=models,
        network=network,
        trains_text_encoder=trains_text_encoder,
        live_text=live,
        captions=CaptionMemo(
            lambda captions: encode_frozen(encode, text_encoders, network, autocast, arch.text.tokenize(captions)),
            arch.text_cache.padding if arch.text_cache else {},
        ),
        optimizer=optimizer,
        schedule=schedule,
        scaler=gradient_scaler(options, device),
        group_names=group_names(names, len(groups), options),
    )
    charts = Charts(accelerator)
    validation = Validation(run, charts)
    writer = build_writer(run, progress, validation)
    if not options.faults.dry_run:
        writer.check_space()
    if facts is not None:
        go_on(run, progress, validation, facts)
    if processes.is_main:
        start_trackers(accelerator, options)
        counts = PictureCounts(training_set.num_train_images, validation.num_pictures, training_set.num_reg_images)
        announce_run(plan, counts, training_set.batch_sizes, options.run.gradient_accumulation_steps)
    previews = Previews.build(run, charts, prompts, text.prompts)
    resumed = facts if facts is not None and facts.step == progress.step else None
    return Prepared(run, progress, writer, charts, previews, validation, resumed)


def keepers_of(run: Run, progress: Progress, validation: Validation) -> dict[str, Keeper]:
    """Everything besides the adapter that has a memory, by the name it has in a state."""
    keepers: dict[str, Keeper] = {
        "optimizer": OptimizerKeeper(run.torch_optimizer, run.optimizer.name),
        "schedule": run.schedule,
        "progress": progress,
    }
    if validation.is_on:
        keepers["validation"] = validation
    return keepers if run.scaler is None else {**keepers, "scaler": run.scaler}


def go_on(run: Run, progress: Progress, validation: Validation, facts: Facts) -> None:
    """Put the run where the state left it, at the step that --initial_step or --initial_epoch may have moved."""
    first_step = progress.step
    data = run.training_set
    report_differences(facts, run.options, data.identity_with_contents, run.processes.count, data.picture_paths)
    rates = base_rates(run.torch_optimizer)
    restore(facts, run.network.module, keepers_of(run, progress, validation))
    follow_rates(run.schedule, run.torch_optimizer, rates)
    progress.step = first_step
    if first_step == facts.step:
        progress.done = set(facts.done)
    progress.average.keep_places_below(run.plan.num_batches)  # pictures may have gone since
    logger.info("going on from %s at step %d of %d", facts.path, first_step, run.plan.max_train_steps)


def prepare_vae(
    options: TrainOptions, arch: Architecture, seed: int, training_set: TrainingSet, processes: Processes
) -> nn.Module | None:
    """The VAE on the device, or None where it has encoded every picture already and may leave memory."""
    device = processes.device
    vae = place(arch.load.vae(), device)
    if not options.caching.cache_latents:
        return vae

    def encode(pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        with torch.no_grad():
            return arch.codec.encode(vae, pixels_BCHW.to(device), generators).float().cpu()

    cache_latents(training_set, encode, identity_of(vae), options.caching, seed, processes)
    return None


def identity_of(module: nn.Module) -> str:
    """A hash of a module's weights, names and dtypes."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def trains_text_encoders(options: TrainOptions) -> bool:
    """Whether the text encoders' adapters move: they exist and their learning rate is not 0."""
    if options.network.network_train_unet_only:
        return False
    rates = options.network.text_encoder_lr or [options.optimizer.learning_rate]
    return any(rate != 0 for rate in rates if rate is not None)


def choose_block_runner(
    options: TrainOptions, arch: Architecture, models: Models, network: AdoptedNetwork, trains_text_encoder: bool
) -> None:
    """Say how blocks run: --gradient_checkpointing where gradients flow; everything else stays in eval mode."""
    for model in (models.denoiser, *models.text_encoders):
        model.eval().requires_grad_(False)
    network.module.train()
    runner = recompute if options.memory.gradient_checkpointing else plain
    arch.run_blocks_with(models.denoiser, runner)
    for encoder in models.text_encoders if trains_text_encoder else []:
        run_encoder_layers_with(encoder, runner)
    if options.memory.gradient_checkpointing:
        network.enable_gradient_checkpointing()


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


def gradient_scaler(options: TrainOptions, device: torch.device) -> torch.amp.GradScaler | None:
    """fp16 gradients need scaling."""
    if options.precision.mixed_precision != "fp16":
        return None
    scaler = torch.amp.GradScaler(device.type)
    if options.precision.full_fp16:
        allow_fp16_gradients(scaler)
    return scaler


def allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """--full_fp16 keeps the adapter itself in fp16, which GradScaler refuses by default."""
    patched: Any = scaler
    unscale = patched._unscale_grads_
    patched._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)


def group_names(names: list[str] | None, num_groups: int, options: TrainOptions) -> list[str]:
    """Names of the optimizer's groups for the charts; where the network module gives none they follow the order."""
    if names is not None:
        return names
    trains_denoiser = not options.network.network_train_text_encoder_only
    if num_groups == 1:
        return ["unet" if trains_denoiser else "textencoder"]
    if num_groups == 2 and trains_text_encoders(options) and trains_denoiser:
        return ["textencoder", "unet"]
    return [f"group{i}" for i in range(num_groups)]


def bytes_of_state(run: Run) -> int:
    """About what a state takes: weights, buffers and the optimizer's memory, two tensors a weight before it has any."""
    memory = [value for state in run.torch_optimizer.state.values() for value in state.values()]
    tensors = [value for value in memory if isinstance(value, Tensor)]
    expected = () if tensors else 2 * run.network.trainable_parameters()
    return bytes_of_tensors([*run.network.module.state_dict().values(), *tensors, *expected])


def build_writer(run: Run, progress: Progress, validation: Validation) -> Writer:
    """What writes the checkpoints; the base files are hashed in the background meanwhile."""
    options, training_set, plan = run.options, run.training_set, run.plan
    facts = RunFacts(
        session_id=secrets.randbelow(2**32),
        started_at=time.time(),
        seed=run.seed,
        num_train_images=training_set.num_train_images,
        num_validation_images=validation.num_pictures,
        num_reg_images=training_set.num_reg_images,
        num_batches_per_epoch=plan.num_batches,
        num_epochs=plan.num_epochs,
        max_train_steps=plan.max_train_steps,
        optimizer=run.optimizer.name,
        has_relative_step=run.optimizer.has_relative_step,
        network_args=network_keywords(options.network),
        datasets=training_set.metadata(options, run.processes.count),
    )
    executor = ThreadPoolExecutor(1, thread_name_prefix="hash")
    base_files = executor.submit(base_file_metadata, options)
    executor.shutdown(wait=False)

    def write_state(folder: Path, step: int, epoch: int, done: Collection[Part]) -> None:
        save_state(
            folder,
            step=step,
            epoch=epoch,
            seed=run.seed,
            num_processes=run.processes.count,
            options=recorded_options(options),
            dataset=training_set.identity_with_contents,
            network=run.network.module,
            keepers=keepers_of(run, progress, validation),
            done=done,
        )

    return Writer(
        options=options,
        is_main=run.processes.is_main,
        names=Names.build(options.saving),
        schedule=Schedule.build(options.saving, plan.num_epochs),
        network=run.network,
        architecture=run.arch.metadata,
        metadata=training_metadata(options, run.arch.metadata, facts),
        base_files=base_files,
        before_saving=run.optimizer.eval,
        after_saving=run.optimizer.train,
        write_state=write_state,
        uploads=Uploads(options.hub),
        state_bytes=partial(bytes_of_state, run),
    )
