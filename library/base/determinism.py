"""Deterministic mode (--deterministic): torch's kernels add in a fixed order, or raise an error."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from library.base.errors import UserError, about

logger = logging.getLogger(__name__)

WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")  # the values with which cuBLAS adds in a fixed order
NO_FIXED_ORDER = re.compile(r"(\w+) does not have a deterministic implementation")


class NotDeterministicError(UserError):
    """An operation of a run with --deterministic has no deterministic form."""


@contextmanager
def deterministic(is_enabled: bool) -> Iterator[None]:
    """Make torch use kernels that add in a fixed order inside the block; operations without one raise
    NotDeterministicError.

    Enter before anything is computed on a GPU. Raises UserError if the environment excludes it.
    """
    if not is_enabled:
        yield
        return
    workspaces = os.environ.setdefault(WORKSPACES, FIXED_WORKSPACES[0])
    if workspaces not in FIXED_WORKSPACES:
        raise about("--deterministic")(
            f": the environment variable {WORKSPACES} is {workspaces!r}, with which cuBLAS adds in varying order",
            f"unset it, or set it to {' or '.join(FIXED_WORKSPACES)}",
        )
    memory: Any = torch.utils.deterministic
    benchmarks, fills = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    torch.backends.cudnn.benchmark = False
    # Otherwise torch writes NaN into every new buffer, to show reads of uninitialized memory: gigabytes of ring slots,
    # staging buffers and activations in each step, without an effect on results.
    memory.fill_uninitialized_memory = False
    logger.info("--deterministic: deterministic kernels are used; steps on a GPU may take longer")
    try:
        # Not `warn_only`, with which attention keeps the atomic adds of its backward pass.
        with deterministic_mode(True), deterministic_attention(), explain_nondeterminism():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmarks
        memory.fill_uninitialized_memory = fills


@contextmanager
def deterministic_mode(is_on: bool) -> Iterator[None]:
    """Switch torch's deterministic mode on or off inside the block; off is for work that does not change the weights,
    such as previews."""
    was_on, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)


@contextmanager
def deterministic_attention() -> Iterator[None]:
    """Exclude attention kernels whose backward pass has no deterministic form inside the block.

    In deterministic mode, those of CUDA's flash and memory-efficient attention do not split keys or queries, see
    attention_backward.cu. cuDNN's has no such form. On ROCm it depends on library and version (pytorch#197771).
    """
    backends: Any = torch.backends.cuda
    excluded = [name for name in ("cudnn", "flash", "mem_efficient") if name == "cudnn" or torch.version.hip]
    before = [getattr(backends, f"{name}_sdp_enabled")() for name in excluded]
    for name in excluded:
        getattr(backends, f"enable_{name}_sdp")(False)
    try:
        yield
    finally:
        for name, was_on in zip(excluded, before, strict=True):
            getattr(backends, f"enable_{name}_sdp")(was_on)


@contextmanager
def explain_nondeterminism(find_module: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Convert torch's error about an operation without a deterministic form to NotDeterministicError.

    `find_module` names the module that uses it, if the error's traceback does not.
    """
    try:
        yield
    except RuntimeError as error:
        match = NO_FIXED_ORDER.search(str(error))
        if match is None:
            raise
        module = find_module() or innermost_module(error.__traceback__)
        raise NotDeterministicError(
            f"--deterministic: the operation {match[1]}{f' in {module}' if module else ''} has no deterministic form "
            f"in torch {torch.__version__}, so the run ends and saves nothing. Leave out --deterministic, or the "
            "option or network module that uses the operation",
            setting="--deterministic",
            cause="does not fit",
        ) from error


def innermost_module(traceback: TracebackType | None) -> str | None:
    """Return the class of the innermost module whose method an error passed; None if it passed none."""
    found = None
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        found = type(owner).__name__ if isinstance(owner, nn.Module) else found
        traceback = traceback.tb_next
    return found
