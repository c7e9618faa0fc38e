"""Quantified memory hints for out-of-memory errors."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

import torch

from library.base.errors import NotThere
from library.base.formatting import format_gib
from library.memory.pinned import max_pinned_bytes
from library.memory.planner.choice import Allowed
from library.memory.planner.gpus import Gpu, MemorySize, typical_gpu
from library.memory.planner.prediction import CountedStep, MemoryMode, ModeCost, predict
from library.training.models.requests import RequestedRun
from library.training.planning.counting import count_run
from library.training.planning.meta_run import shape_of_batch
from library.training.planning.settings import describe, resolve_allowed_ever, resolve_memory_mode
from library.training.run_parts import Run
from library.types import Batch

MOST_LINES = 6
WORTH = 0.02  # fraction of the memory needed; smaller savings are not mentioned


def memory_hints(requested: RequestedRun, run: Run, batch: Batch) -> list[str]:
    """Describe configurations of this step that need less memory than the current one, each saving more than a faster
    one.

    Nothing is loaded; counting takes some seconds. Returns nothing for
    third-party network modules, which may need real weights, and if no configuration saves much.
    """
    device = run.context.device
    if not requested.module.is_ours:
        return []
    shape = shape_of_batch(batch, run.context.arch.codec.spec.downscale)
    try:
        step = count_run(requested, shape, device).step
    except NotThere:  # a run with cached features may lack the text encoders that counting needs
        return []
    allowed = resolve_allowed_ever(run.options.precision, run.options.distributed)
    mode = resolve_memory_mode(run.options.memory, run.options.precision, run.options.distributed)
    return pick_evenly(list(lines(step, mode, allowed, gpu_like(device))))


def gpu_like(device: torch.device) -> Gpu:
    """Return a common GPU with this one's memory size; only relative times are shown."""
    is_gpu = device.type == "cuda"
    gpu = typical_gpu(MemorySize(torch.cuda.get_device_properties(device).total_memory if is_gpu else 0))
    return replace(gpu, pinnable_bytes=max_pinned_bytes()) if is_gpu else gpu


def lines(step: CountedStep, used: MemoryMode, allowed: Allowed, gpu: Gpu) -> Iterator[str]:
    current = predict(step, used, gpu)
    best = current.device_bytes
    for candidate in sorted(
        candidates(step, allowed, gpu), key=lambda candidate: (candidate.seconds, candidate.device_bytes)
    ):
        if candidate.device_bytes < best - WORTH * current.device_bytes:
            best = candidate.device_bytes
            percent = round(100 * (candidate.seconds / current.seconds - 1))
            time = f"{percent} % longer" if percent > 0 else "no longer"
            yield f"{describe(candidate.mode)} needs {format_gib(current.device_bytes - best)} less and takes {time}"


def candidates(step: CountedStep, allowed: Allowed, gpu: Gpu) -> Iterator[ModeCost]:
    """Yield every configuration with no blocks offloaded, half of them, and as many as possible, where offloaded inputs
    can be pinned."""
    # --shard_base excludes offloaded blocks.
    max_offloaded = step.most_offloaded if allowed.shared_by == 1 else 0
    counts = sorted({0, max_offloaded // 2, max_offloaded})
    for mode in allowed.modes():
        predictions = [predict(step, replace(mode, num_offloaded=num_offloaded), gpu) for num_offloaded in counts]
        yield from (predicted for predicted in predictions if predicted.pins_inputs)


def pick_evenly(hints: Sequence[str]) -> list[str]:
    """Return at most `MOST_LINES` of many lines, evenly spread, the last of them included."""
    stride = ceil(len(hints) / MOST_LINES) or 1
    return list(reversed(hints[::-1][::stride]))
