"""Batches one ahead: while the device computes one, the next is fetched and copied to it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.memory.devices import is_on, send
from library.training.reporting.step_times import StepTimes
from library.types import Batch

TENSORS = ("pixels_BCHW", "latents_BCHW", "masks_B1HW")  # of a batch, that are large; a step sends the others itself


class CudaCopies:
    """Copies of batches from pinned memory by a stream of their own, beside the arithmetic.

    After `ready` the device computes with the batch that `start` returned.
    """

    def __init__(self, device: torch.device, on_host: Sequence[str]) -> None:
        """`on_host` are names of features that stay on the host."""
        self._device, self._on_host = device, on_host
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._stream):
            copied = moved(batch, self._on_host, lambda tensor: send(tensor, self._device))
            self._done.record(self._stream)
        return copied

    def ready(self, batch: Batch) -> None:
        computes = torch.cuda.current_stream(self._device)
        computes.wait_event(self._done)

        def note(tensor: Tensor) -> Tensor:
            if is_on(tensor, self._device):
                tensor.record_stream(computes)  # its memory is the other stream's
            return tensor

        moved(batch, self._on_host, note)


def moved(batch: Batch, on_host: Sequence[str], move: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch whose large tensors are `move`d."""
    found: dict[str, Any] = {name: getattr(batch, name) for name in TENSORS}
    found = {name: None if tensor is None else move(tensor) for name, tensor in found.items()}
    if batch.conditioning is not None:
        features = batch.conditioning.items()
        found["conditioning"] = {name: t if name in on_host else move(t) for name, t in features}
    return replace(batch, **found)


class Ahead:
    """The batches of an iterator in their order; `fetch` begins to bring the next one while this one computes.

    An error in fetching a batch is raised when the batch is asked for: the steps before it are taken.
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
        """Begin to bring the next batch, if there is one and that is not done."""
        if self._next is not None or self._error is not None or not self._num_left:
            return
        self._num_left -= 1
        try:
            with self._times.stage("waiting for data"):
                batch = next(self._batches)
                self._next = batch if self._copies is None else self._copies.start(batch)
        except Exception as error:
            self._error = error
