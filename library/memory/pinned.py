"""Pinned main memory, from which a GPU copies while the host goes on, or pageable memory where it is refused.

All copies work from pageable memory too, but the host waits for them.
"""

import logging
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import psutil
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MOST = 0.4  # share of main memory: Windows pins at most about half, and nothing else can use pinned memory
WSL_PINNABLE_BYTES = 2**29  # 0.5 to 1 GiB are published, for any machine


def pinning_limit() -> int:
    """Return the bytes of main memory that a run pins at most; the system may refuse earlier."""
    return int(MOST * psutil.virtual_memory().total)


def max_pinned_bytes() -> int:
    """Return the bytes of main memory that can be expected to be pinned on this machine."""
    return WSL_PINNABLE_BYTES if "microsoft" in platform.release().lower() else pinning_limit()


def rounded_size(num_bytes: int) -> int:
    """Return the bytes that torch pins for a tensor: a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def pin_if_possible(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor in pinned memory, or the tensor itself if the system refuses that."""
    pinned = try_to_pin(tensor.pin_memory)
    return tensor if pinned is None else pinned


def empty_host_copy(tensor: Tensor) -> Tensor:
    """Return uninitialised main memory for a copy of a GPU's tensor, pinned if possible."""
    pinned = try_to_pin(lambda: torch.empty_like(tensor, device="cpu", pin_memory=True))
    return torch.empty_like(tensor, device="cpu") if pinned is None else pinned


def try_to_pin(allocate: Callable[[], Tensor]) -> Tensor | None:
    """Return pinned memory from `allocate`, or None if the system refuses it, which is logged once."""
    try:
        return allocate()
    except RuntimeError as error:
        clear_last_error()
        warn_of_refusal(str(error).splitlines()[0])
        return None


@cache
def warn_of_refusal(reason: str) -> None:
    logger.warning(
        "the system refuses to pin more main memory (%s): copies to and from the GPU take longer, because they use "
        "pageable memory; WSL2 pins 0.5 to 1 GiB in all",
        reason,
    )


def clear_last_error() -> None:
    """Clear the error that CUDA keeps after a refused call. Otherwise the run's next kernel would raise it."""
    if not torch.cuda.is_available():
        return
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # a kernel launch raises and clears it; torch has no other way
