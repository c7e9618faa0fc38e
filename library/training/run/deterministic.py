"""Kernels that add in a fixed order (`deterministic`), so that a repeated run computes the same numbers on a GPU."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS gives streams workspaces in any order
FIXED_WORKSPACES = ":4096:8"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch take the kernels whose sums have one order, where it has them, and warn where it has none.

    To be entered before anything is computed on a card. On the CPU the sums have one order anyway.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES)
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    benchmarks, fills = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # It finds reads of memory that nobody wrote, and writes NaN into every buffer for that: gigabytes of slots, staging
    # and activations in each step.
    memory.fill_uninitialized_memory = False
    logger.info("--deterministic: kernels whose sums have one order; on a card steps may take longer")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmarks
        memory.fill_uninitialized_memory = fills
