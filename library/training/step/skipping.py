"""Steps that an optimizer leaves out by itself, by a number on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def can_leave_out(optimizer: Optimizer) -> bool:
    """Return True if it is one of torch's fused optimizers, which do so for loss scaling."""
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return is_fused and getattr(optimizer, "_step_supports_amp_scaling", False)


@contextmanager
def left_out_if(optimizer: Optimizer, is_damaged: Tensor) -> Iterator[None]:
    """Inside, a step of such an optimizer changes nothing, its count of steps included, where `is_damaged` is true."""
    fused: Any = optimizer
    fused.found_inf = is_damaged.float()
    try:
        yield
    finally:
        del fused.found_inf
