"""Prefetching: while the device computes one batch, the next is loaded and copied to it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.memory.devices import is_on, send
from library.training.reporting.step_times import StepTimes
from library.types import Batch

TENSORS = ("pixels_BCHW", "latents_BCHW", "masks_B1HW")  # large tensors of a batch; a step copies the small ones itself


class CudaCopies:
    """Copies from pinned memory on a separate stream, overlapping computation."""

    def __init__(self, device: torch.device, on_host: Sequence[str]) -> None:
        """`on_host` names the features that stay on the host."""
        self._device, self._on_host = device, on_host
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # One event is enough, because only one batch is copied ahead.
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._stream):
            copied = move_batch(batch, self._on_host, lambda tensor: send(tensor, self._device))
            self._done.record(self._stream)
        return copied

    def ready(self, batch: Batch) -> None:
        compute_stream = torch.cuda.current_stream(self._device)
        compute_stream.wait_event(self._done)

        def note(tensor: Tensor) -> Tensor:
            if is_on(tensor, self._device):
                tensor.record_stream(compute_stream)  # no reuse of its memory before the compute stream is done
            return tensor

        move_batch(batch, self._on_host, note)


def move_batch(batch: Batch, on_host: Sequence[str], move: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with its large tensors passed through `move`."""
    moved: dict[str, Any] = {name: getattr(batch, name) for name in TENSORS}
    moved = {name: None if tensor is None else move(tensor) for name, tensor in moved.items()}
    if batch.conditioning is not None:
        features = batch.conditioning.items()
        moved["conditioning"] = {name: feature if name in on_host else move(feature) for name, feature in features}
    return replace(batch, **moved)


class Ahead:
    """An iterator over batches; `fetch` starts loading the next batch while the current one computes.

    An error while loading is raised when that batch is requested, after all steps before it.
    """

    def __init__(self, batches: Iterator[Batch], count: int, copies: CudaCopies | None, times: StepTimes) -> None:
        """`count` of them are to come; without `copies` a batch stays where it is, and the step sends it."""
        self._batches, self._num_left, self._copies, self._times = batches, count, copies, times
        self._next: Batch | None = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.fetch()
        if self._error is not None:
            raise self._error
        batch, self._next = self._next, None
        if batch is None:
            raise StopIteration
        with self._times.stage("copying"):
            if self._copies is not None:
                self._copies.ready(batch)
        return batch

    def fetch(self) -> None:
        """Start loading the next batch, unless there is none or it is loaded."""
        if self._next is not None or self._error is not None or not self._num_left:
            return
        self._num_left -= 1
        try:
            with self._times.stage("waiting for data"):
                batch = next(self._batches)
                self._next = batch if self._copies is None else self._copies.start(batch)
        except Exception as error:
            self._error = error
