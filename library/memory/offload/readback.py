"""Numbers that a device has computed, on their way to the host."""

from typing import Any

import torch
from torch import Tensor


class Readback:
    """Values of the device that the host asks for later: it then waits for what came before them, not for what follows.

    This is the one place of a step where the host waits for a card. Elsewhere `.item()`, `.tolist()` and plain copies
    would wait until it has done all that it was given.
    """

    def __init__(self, values: Tensor) -> None:
        """Begin to bring `values`, of one dimension, to the host."""
        self._arrived: Any = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The values; waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._values.tolist()
        return found
