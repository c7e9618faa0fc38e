"""Asynchronous transfer of computed numbers from a device to the host."""

from typing import Any

import torch
from torch import Tensor

from library.memory.pinned import empty_host_copy


class Readback:
    """Device values that the host reads later, waiting only for the work that was queued before them.

    This is the only place of a step where the host waits for a GPU. `.item()`, `.tolist()` and plain copies would wait
    until the GPU has finished all queued work, and so does the copy here if no memory can be pinned.
    """

    def __init__(self, values: Tensor) -> None:
        """Start copying the one-dimensional `values` to the host."""
        self._arrived: Any = None
        self._values = values
        if values.device.type == "cuda":
            self._values = empty_host_copy(values)
            self._values.copy_(values, non_blocking=True)
            # This is the host's longest wait of a step. A blocking event leaves the core to the data loader's workers.
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Wait for the copy and return the values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
