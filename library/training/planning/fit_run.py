"""Configures a run for the fastest execution that fits its GPU."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from library.base.errors import UserError, about, error_in, needing
from library.data.description.captions import iterate_fullest_captions
from library.data.plan.data_plan import DataPlan
from library.data.training_data import BatchSizes
from library.memory.devices import DTYPES
from library.memory.planner.gpus import GIB, Gpu, parse_size
from library.memory.planner.measured import benchmark_gpu
from library.processes.process_group import Processes
from library.training.models.requests import RequestedRun
from library.training.planning.counting import CountedRun, count_run
from library.training.planning.fit import Fit, fit_to
from library.training.planning.meta_run import BatchShape

logger = logging.getLogger(__name__)

# CUDA loads most kernels on first use, so a context takes less here than CONTEXT_BYTES. [derived]
BARE_CONTEXT_BYTES = 7 * GIB // 20


CountTokens = Callable[[str], int]


def largest_batch(sizes: BatchSizes, plan: DataPlan | None = None, count_tokens: CountTokens = len) -> BatchShape:
    """Return the batch with the most pixels, with the captions of `plan`."""
    shapes = [BatchShape(count, *size, tuple(references)) for count, (size, *references) in sizes.batch_shapes()]
    largest = max(shapes, key=lambda shape: shape.num_pixels)
    if plan is None:
        return largest
    return replace(largest, num_tokens=find_longest_caption(plan, count_tokens), num_captions=count_captions(plan))


def count_captions(plan: DataPlan) -> int | None:
    """Return how many different captions a run can draw; None where they vary or are not known before it."""
    captions = {""}  # dropped ones
    for subset in (subset for dataset in plan.datasets for subset in dataset.subsets):
        if subset.config.captions.varies or not len(subset.images.captions):
            return None
        for text in (*subset.images.captions, subset.config.class_tokens or ""):
            captions.update(iterate_fullest_captions(text, subset.config.captions))
    return len(captions)


def find_longest_caption(plan: DataPlan, count_tokens: CountTokens) -> int | None:
    """Return the tokens of the longest caption that a run can draw; None where captions are not known before it."""
    most = 0
    for subset in (subset for dataset in plan.datasets for subset in dataset.subsets):
        if not len(subset.images.captions) or not any(subset.images.captions):
            return None
        for text in (*subset.images.captions, subset.config.class_tokens or ""):
            for caption in iterate_fullest_captions(text, subset.config.captions):
                if len(caption.encode()) > most:  # a token has at least one byte
                    most = max(most, count_tokens(caption))
    return most


SPEEDS = ("flops", "bus", "bandwidth", "staging", "launch")  # of a Gpu


def free_memory(device: torch.device) -> int:
    """Return the GPU memory available to a run, including this process's existing context."""
    if device.type != "cuda":
        raise about("--fit")("auto measures the free memory of the GPU, and there is none", "give a size such as 12GB")
    return torch.cuda.mem_get_info(device)[0] + BARE_CONTEXT_BYTES


def measure_gpu(size_or_auto: str, mixed_precision: str, processes: Processes) -> Gpu:
    """Return this process's device with the memory that the user allows (`size_or_auto`: such as "12GB", or "auto").

    Several processes choose alike: they use the least memory of any, and the main process's speed.
    """
    size = None if size_or_auto == "auto" else parse_size("--fit", size_or_auto)
    available_bytes = free_memory(processes.device) if size is None else size.free_bytes
    available_bytes = min(map(int, processes.merged("room", {processes.rank: str(available_bytes)}).values()))
    try:
        gpu = benchmark_gpu(processes.device, available_bytes, DTYPES[mixed_precision])
    except torch.OutOfMemoryError:
        raise about("--fit", cause="does not fit")(
            f"{size_or_auto}: the GPU has too little free memory to measure it", "close the programs that use it"
        ) from None
    speeds = processes.share("speed", " ".join(str(getattr(gpu, name)) for name in SPEEDS)).split()
    shared: dict[str, Any] = dict(zip(SPEEDS, map(float, speeds), strict=True))
    return replace(gpu, nominal_bytes=size.num_bytes if size is not None and size.names_gpu else None, **shared)


def count_adapter_run(run: RequestedRun, batch: BatchShape, device: torch.device) -> CountedRun:
    """Count the run. Raises UserError for third-party network modules that need real weights."""
    module = run.module
    try:
        with needing("--fit counts captions with the text encoders; give them, or leave it out"):
            return count_run(run, batch, device)
    except UserError:
        raise
    except Exception as error:  # third-party code may raise anything when it reads missing values
        if module.is_ours:
            raise
        raise about("--fit")(
            f"cannot count what --network_module {module.name} does ({type(error).__name__}: {error})",
            "leave out --fit and set what saves memory yourself",
        ) from error


def fit_run(run: RequestedRun, sizes: BatchSizes, processes: Processes, plan: DataPlan | None = None) -> Fit:
    """Choose how to run the largest batch, and log the candidates. Raises UserError if nothing fits.

    Captions are counted as long as the longest of the `plan`, without one as long as the model allows.
    The architecture does not depend on the choice: weight formats, recomputation and offloading are applied later.
    """
    options = run.options
    assert options.fit.fit is not None
    gpu = measure_gpu(options.fit.fit, options.precision.mixed_precision, processes)
    batch = largest_batch(sizes, plan, run.arch.text.count_tokens)
    if batch.num_tokens is not None and processes.is_main:
        logger.info("--fit counts captions of %d tokens, the longest of the data set", batch.num_tokens)
    counted = count_adapter_run(run, batch, processes.device)
    fit = fit_to(counted, gpu, sizes.max_train_steps)
    if fit.choice.chosen is None:
        raise error_in("--fit")("\n  ".join([f"--fit {options.fit.fit}", *fit.lines()]))
    for line in fit.lines() if processes.is_main else ():
        logger.info("%s", line)
    return fit
