"""The device and dtype that a run computes with."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from library.memory.devices import DTYPES
from library.options.machine.memory import PrecisionOptions
from library.training.step.context import Autocast


@dataclass(frozen=True)
class Compute:
    """The device of this process, and its compute dtype."""

    device: torch.device
    dtype: torch.dtype
    autocast: Autocast

    @classmethod
    def build(cls, precision: PrecisionOptions, device: torch.device) -> "Compute":
        """Read the compute dtype and autocast from the options."""
        dtype = DTYPES[precision.mixed_precision]
        # autocast to float32 would only cost a lookup per operation
        return cls(device, dtype, nullcontext if dtype == torch.float32 else lambda: torch.autocast(device.type, dtype))
