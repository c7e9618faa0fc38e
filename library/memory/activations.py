"""Recomputation from block inputs that are kept in main memory."""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.blocks import BlockRunner, plain, recompute
from library.memory.pinned import empty_host_copy, rounded_size

NUM_KEPT = 2  # blocks whose inputs stay on the GPU while they are copied: the current one and the one before


class RecomputeFromMainMemory:
    """A runner that recomputes a block in the backward pass from inputs kept in main memory.

    A GPU copies the inputs while it computes, and frees them two blocks later. It fetches those of a block while the
    next one in forward order is recomputed.
    """

    def __init__(self, budget: "PinnedBudget | None" = None, recompute: BlockRunner = recompute) -> None:
        """Inputs within `budget` are pinned, all of them without one."""
        self.recompute = recompute
        self.transfers = Transfers(budget or PinnedBudget())
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
        block_inputs = BlockInputs(self.last, self.transfers)
        self.last = weakref.ref(block_inputs)
        self.transfers.begin_block()

        def pack(tensor: Tensor) -> Tensor | tuple[BlockInputs, int]:
            return (block_inputs, block_inputs.add(tensor)) if identify_values(tensor) in moved_keys else tensor

        with saved_tensors_hooks(pack, unpack):
            return self.recompute(block, *inputs, **named)


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


class CopiedTensor:
    """A tensor on a GPU that a copy stream reads or fills.

    `record_stream` would hold its memory until the host has seen the copy end. The host is a pass ahead of the GPU, so
    the inputs of all blocks would be held. Instead the computing stream waits for the copy before the tensor is freed.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """Follow the copy that was queued last on `stream`."""
        self.tensor = tensor
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.copied.record(stream)
        self.without_wait = weakref.finalize(self, hold_for, stream, tensor)
        self.without_wait.atexit = False

    def wait(self) -> Tensor:
        """Let the computing stream wait for the copy, and return the tensor."""
        torch.cuda.current_stream(self.tensor.device).wait_event(self.copied)
        self.without_wait.detach()
        return self.tensor


def hold_for(stream: torch.cuda.Stream, tensor: Tensor) -> None:
    """Keep a tensor's memory until the work queued on a stream is done. For passes that end early."""
    tensor.record_stream(stream)


class Transfers:
    """The copies between main memory and GPUs of all blocks of a runner."""

    def __init__(self, budget: PinnedBudget) -> None:
        self.budget = budget
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.outgoing: deque[list[CopiedTensor]] = deque()  # by block

    def begin_block(self) -> None:
        """Free the inputs of the block before the previous one: computing has given their copies time to end."""
        self.outgoing.append([])
        self.release_outgoing(NUM_KEPT)

    def release_outgoing(self, num_kept: int = 0) -> None:
        while len(self.outgoing) > num_kept:
            for copied in self.outgoing.popleft():
                copied.wait()

    def send(self, tensor: Tensor) -> Tensor:
        """Return a copy in main memory. The host does not wait for a GPU, if the copy is pinned."""
        if tensor.device.type != "cuda":
            return torch.empty_like(tensor, device="cpu").copy_(tensor)
        host_copy = self.budget.allocate(tensor)
        self.outgoing[-1].append(self.copy(tensor, host_copy, tensor))
        return host_copy

    def fetch(self, host_copy: Tensor, device: torch.device) -> CopiedTensor:
        """Start copying a tensor to a GPU."""
        fetched = torch.empty_like(host_copy, device=device)
        return self.copy(host_copy, fetched, fetched)

    def copy(self, source: Tensor, target: Tensor, on_gpu: Tensor) -> CopiedTensor:
        device = on_gpu.device
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self.streams[device]
        # The source may not be computed yet, and the memory of the target still be in use.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return CopiedTensor(on_gpu, stream)


class BlockInputs:
    """The inputs of one block in main memory. `before` returns those of the previous block, or None if freed."""

    def __init__(self, before: Callable[[], "BlockInputs | None"], transfers: Transfers) -> None:
        self.before, self.transfers = before, transfers
        self.offloaded: list[tuple[Tensor, torch.device]] = []
        self.fetched: dict[int, Tensor | CopiedTensor] = {}

    def add(self, tensor: Tensor) -> int:
        """Copy a tensor to main memory and return its index."""
        self.offloaded.append((self.transfers.send(tensor), tensor.device))
        return len(self.offloaded) - 1

    def take(self, i: int) -> Tensor:
        """Return a tensor on its device, and start fetching the inputs of the block that is recomputed next."""
        self.transfers.release_outgoing()
        if i not in self.fetched:
            self.fetch()
        previous = self.before()
        if previous is not None and not previous.fetched:
            previous.fetch()
        fetched = self.fetched.pop(i)
        return fetched.wait() if isinstance(fetched, CopiedTensor) else fetched

    def fetch(self) -> None:
        """Start copying all tensors to their devices."""
        for i, (host_copy, device) in enumerate(self.offloaded):
            is_gpu = device.type == "cuda"
            self.fetched[i] = self.transfers.fetch(host_copy, device) if is_gpu else host_copy.to(device)
