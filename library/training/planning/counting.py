"""Counts the memory and operations of a run from its options and the headers of its checkpoint, without loading or
computing.

Models, adapter, optimizer and loss are built as in the run, on fake tensors that only have shapes.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from library.base.collector import pause_collection
from library.base.progress import progress_bar
from library.memory.formats.int8 import clear_hadamard_cache
from library.memory.fused_kernels import compiles_bf16, compiles_for, count_fused
from library.memory.planner.fakes import emulate_cuda_norms
from library.memory.planner.prediction import CountedStep
from library.memory.planner.stages import StageMemory
from library.options.train import TrainOptions
from library.training.models.preflight import mute_logging
from library.training.models.requests import RequestedRun
from library.training.planning.counted_inputs import count_inputs, count_kept_features
from library.training.planning.counted_step import build_step, count_some_blocks, count_step, count_update
from library.training.planning.meta_run import BatchShape, counter_for, fake_batch, has_latents, run_on_meta_device
from library.training.planning.previews import CountedPreview, count_preview

NUM_COUNTS = 5  # models, encoding, a pass, a recomputed pass, the optimizer


@dataclass(frozen=True)
class CountedRun:
    """The memory and time that the parts of a run need."""

    options: TrainOptions  # of the base model, the data and the loop
    batch: BatchShape  # the largest
    step: CountedStep
    stages: tuple[StageMemory, ...]  # before training, one after another, each freeing its memory
    preview: CountedPreview | None = None  # during training


def count_run(run: RequestedRun, batch: BatchShape, device: torch.device, is_fused: bool | None = None) -> CountedRun:
    """Count a run on `device` whose largest batch is `batch`. Raises UserError as the run's set-up would.

    `is_fused` says whether a GPU that is not in this machine fuses operations; None asks this machine's, if it has one.
    """
    options, arch = run.options, run.arch
    is_off = options.diagnostics.deterministic or options.kernels.no_fused_operations
    is_fused = has_fused_kernels(device, is_off, options.precision.mixed_precision, is_fused)
    with (
        progress_bar("counting memory…", NUM_COUNTS, leave=False) as bar,
        mute_logging(),
        pause_collection(),  # looking for cycles takes an eighth of the time, and counts depend on when it happens
        # Building the adapter draws from the global generator, whose state the run needs unchanged.
        torch.random.fork_rng(devices=[]),
        clear_hadamard_cache(),
        FakeTensorMode(allow_non_fake_inputs=True),
        # Fakes are CPU tensors, and autocast treats norms there otherwise than on a GPU.
        nullcontext() if device.type == "cpu" else emulate_cuda_norms(),
        count_fused() if is_fused else nullcontext(),
    ):
        meta = run_on_meta_device(run, batch.num_tokens)
        bar.update(1)
        inputs = count_inputs(meta, batch)
        caches_latents = has_latents(options.caching, options.concepts)
        preview = count_preview(options.preview, arch, meta.vae, not caches_latents, counter_for(arch))
        bar.update(1)
        fake = fake_batch(arch, inputs.rows, inputs.conditioning, caches_latents)
        timeline = count_some_blocks(
            arch.chains(meta.models.denoiser), lambda repeats: count_step(meta, fake, repeats, partial(bar.update, 1))
        )
        is_averaged = bool(options.averaging.ema_decay)
        optimizer = count_update(options.optimizer, options.network, is_averaged, arch, meta.network)
        bar.update(1)
        features = count_kept_features(meta, batch.num_captions)
    step = replace(build_step(meta, fake, timeline, optimizer, inputs.gradientless), feature_bytes=features)
    return CountedRun(options, batch, step, inputs.stages, preview)


def has_fused_kernels(device: torch.device, is_off: bool, mixed_precision: str, is_fused: bool | None) -> bool:
    """Return True if fused operations are one kernel each on `device`; `is_off` says that the options turn them off."""
    if is_off or device.type != "cuda":
        return False
    if is_fused is not None or not torch.cuda.is_available():
        return is_fused is not False
    return compiles_for(device) and (mixed_precision != "bf16" or compiles_bf16(device))
