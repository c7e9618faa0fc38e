"""Faster kernels of a CUDA GPU for one run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.memory.fused_kernels import fused_operations
from library.options.machine.kernels import KernelOptions

logger = logging.getLogger(__name__)


@contextmanager
def cuda_kernels(options: KernelOptions) -> Iterator[None]:
    """Enable the requested kernels inside the block, and restore torch's settings afterwards.

    Settings that are not requested stay as torch, or a program that imports a script, has set them. Enter before
    anything runs on a GPU, and outside `library.base.determinism.deterministic`, which disables cuDNN's benchmark.
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
        with fused_operations(options.no_fused_operations):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
