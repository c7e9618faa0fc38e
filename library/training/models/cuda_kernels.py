"""Kernels of a CUDA GPU for one run: faster ones, and those that add in a fixed order (`deterministic`)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from library.options.machine.kernels import KernelOptions

logger = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS gives streams workspaces in any order
FIXED_WORKSPACES = ":4096:8"


@contextmanager
def cuda_kernels(options: KernelOptions) -> Iterator[None]:
    """Enable the requested kernels inside the block, and restore torch's settings afterwards.

    Settings that are not requested stay as torch, or a program that imports a script, has set them. Enter before
    anything runs on a GPU, and outside `deterministic`, which disables cuDNN's benchmark.
    """
    flags = [f"--{name}" for name, value in options.flat().items() if value]
    if flags and not torch.cuda.is_available():
        logger.warning("%s: no effect, as torch finds no CUDA GPU", " and ".join(flags))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
    if options.cuda_allow_tf32:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
    if options.cuda_cudnn_benchmark:
        cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def deterministic(is_enabled: bool) -> Iterator[None]:
    """Make torch use kernels that add in a fixed order inside the block, and warn where there is none.

    Enter before anything is computed on a GPU. On the CPU sums always have a fixed order.
    """
    if not is_enabled:
        yield
        return
    os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES)
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    benchmarks, fills = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Otherwise torch writes NaN into every new buffer, to show reads of uninitialized memory: gigabytes of ring slots,
    # staging buffers and activations in each step, without an effect on results.
    memory.fill_uninitialized_memory = False
    logger.info("--deterministic: deterministic kernels are used; steps on a GPU may take longer")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmarks
        memory.fill_uninitialized_memory = fills
