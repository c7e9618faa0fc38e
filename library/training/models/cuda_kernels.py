"""Faster kernels on a CUDA GPU, for one run: TF32 and cuDNN's benchmark mode."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.options.machine.kernels import KernelOptions

logger = logging.getLogger(__name__)


@contextmanager
def cuda_kernels(options: KernelOptions) -> Iterator[None]:
    """Let torch take the kernels that are asked for, and put its settings back at the end.

    What is not asked for stays as torch, or a program that imports a script, has it. To be entered before anything is
    computed on a card, and around `deterministic`, which takes cuDNN's trials back.
    """
    asked = [f"--{name}" for name, value in options.flat().items() if value]
    if asked and not torch.cuda.is_available():
        logger.warning("%s: no effect, as torch finds no CUDA card", " and ".join(asked))
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
