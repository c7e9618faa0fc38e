"""Recomputation from block inputs that are kept in main memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.blocks import plain, recompute
from library.memory.pinned import empty_host_copy, rounded_size

CopyStreams = dict[torch.device, torch.cuda.Stream]


class RecomputeFromMainMemory:
    """A runner that recomputes a block in the backward pass from inputs kept in main memory.

    A GPU copies the inputs while it computes. It fetches those of a block while the next one in forward order is
    recomputed.
    """

    def __init__(self, budget: "PinnedBudget | None" = None) -> None:
        """Inputs within `budget` are pinned, all of them without one."""
        self.streams: CopyStreams = {}
        self.budget = budget or PinnedBudget()
        self.last: Callable[[], BlockInputs | None] = lambda: None

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(block, *inputs, **named)
        # Only inputs that carry a gradient are moved: frozen ones, such as positions and masks, are shared by all
        # blocks and would be copied once per block.
        moved_ids = {
            id(value) for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.requires_grad
        }
        moved_keys = {identify_values(value) for value in (*inputs, *named.values()) if id(value) in moved_ids}
        # Autograd's graph keeps the inputs alive. A strong reference here would also keep those of a discarded graph.
        block_inputs = BlockInputs(self.last, self.streams, self.budget)
        self.last = weakref.ref(block_inputs)

        def pack(tensor: Tensor) -> Tensor | tuple[BlockInputs, int]:
            return (block_inputs, block_inputs.add(tensor)) if identify_values(tensor) in moved_keys else tensor

        with saved_tensors_hooks(pack, unpack):
            return recompute(block, *inputs, **named)


def unpack(packed: Tensor | tuple["BlockInputs", int]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    block_inputs, i = packed
    return block_inputs.take(i)


def identify_values(tensor: Tensor) -> tuple[int, torch.Size]:
    """Return a key for the values of a tensor. Autograd creates aliases: other objects with the same values."""
    return tensor.data_ptr(), tensor.shape


@dataclass
class PinnedBudget:
    """Pinned memory for inputs, which several runners share."""

    most_bytes: float = inf
    num_bytes: int = 0  # in use

    def allocate(self, tensor: Tensor) -> Tensor:
        """Return main memory for a copy of a tensor: pinned, or pageable beyond the budget or if it is refused."""
        size = rounded_size(tensor.nbytes)
        if self.num_bytes + size > self.most_bytes:
            return torch.empty_like(tensor, device="cpu")
        copy = empty_host_copy(tensor)
        if copy.is_pinned():
            self.num_bytes += size
            weakref.finalize(copy, self.release, size).atexit = False
        return copy

    def release(self, size: int) -> None:
        self.num_bytes -= size


class BlockInputs:
    """The inputs of one block in main memory. `before` returns those of the previous block, or None if freed."""

    def __init__(self, before: Callable[[], "BlockInputs | None"], streams: CopyStreams, budget: PinnedBudget) -> None:
        self.before, self.streams, self.budget = before, streams, budget
        self.offloaded: list[tuple[Tensor, torch.device]] = []
        self.fetched: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def add(self, tensor: Tensor) -> int:
        """Copy a tensor to main memory and return its index. The host does not wait for a GPU, if it is pinned."""
        on_gpu = tensor.device.type == "cuda"
        copy = self.budget.allocate(tensor) if on_gpu else torch.empty_like(tensor, device="cpu")
        if on_gpu:
            stream = self.stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # the caller may free it before it is copied
        else:
            copy.copy_(tensor)
        self.offloaded.append((copy, tensor.device))
        return len(self.offloaded) - 1

    def take(self, i: int) -> Tensor:
        """Return a tensor on its device, and start fetching the inputs of the block that is recomputed next."""
        if i not in self.fetched:
            self.fetch()
        previous = self.before()
        if previous is not None and not previous.fetched:
            previous.fetch()
        tensor, arrived = self.fetched.pop(i)
        if arrived is not None:
            torch.cuda.current_stream(tensor.device).wait_event(arrived)
        return tensor

    def fetch(self) -> None:
        """Start copying all tensors to their devices."""
        for i, (host_copy, device) in enumerate(self.offloaded):
            self.fetched[i] = self.start(host_copy, device) if device.type == "cuda" else (host_copy.to(device), None)

    def start(self, host_copy: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        stream = self.stream(device)
        fetched = torch.empty_like(host_copy, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))  # it may still use the memory of `fetched`
        with torch.cuda.stream(stream):
            fetched.copy_(host_copy, non_blocking=True)
        fetched.record_stream(stream)  # freed during the copy if the backward pass ends early
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(stream)
        return fetched, arrived

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.streams[device]
