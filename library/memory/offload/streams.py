"""Copies from main memory into the slots of a ring while the device computes.

Every implementation keeps two promises. `start(slot, master)` fills a slot only after all work that is already queued
on the device, including reads of the slot's old bytes. Work queued after `ready(slot)` sees the slot filled.
"""

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from library.memory.pinned import rounded_size, try_to_pin

NUM_STAGING = 2
PIECE = 64 << 20  # bytes of a staging buffer; WSL2 pins 0.5 to 1 GiB in total, and torch rounds up to powers of two
NAN_BYTE = 0xFF  # repeated, it is a NaN in every floating-point format


MasterT = TypeVar("MasterT", contravariant=True)
SlotT = TypeVar("SlotT")


class Streams(Protocol[MasterT, SlotT]):
    """Slots on the device, and the copies that fill them."""

    slots: list[SlotT]

    def start(self, slot: int, master: MasterT) -> None: ...
    def ready(self, slot: int) -> None: ...


class HostStreams:
    """Slots for devices without copy streams. A slot is filled in `ready`.

    Until then it holds NaN, so that use of a block after its slot was reassigned shows at once.
    """

    def __init__(self, num_slots: int, num_bytes: int, device: torch.device) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self.masters: dict[int, Tensor] = {}

    def start(self, slot: int, master: Tensor) -> None:
        self.slots[slot].fill_(NAN_BYTE)
        self.masters[slot] = master

    def ready(self, slot: int) -> None:
        master = self.masters.pop(slot, None)
        if master is not None:
            self.slots[slot][: len(master)].copy_(master)


class CudaStreams:
    """Copies from pinned memory on a separate stream, in parallel with computing. The host never waits."""

    def __init__(self, num_slots: int, num_bytes: int, device: torch.device) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.filled = [torch.cuda.Event() for _ in self.slots]  # type: ignore[no-untyped-call]
        for slot in self.slots:
            slot.record_stream(self.copies)  # a ring may be freed during its last copy

    def start(self, slot: int, master: Tensor) -> None:
        self.copies.wait_stream(torch.cuda.current_stream(self.slots[slot].device))
        self.copy(slot, master)

    def copy(self, slot: int, master: Tensor, first: int = 0) -> None:
        """Queue the copy to position `first` of a slot.

        The allocator need not track it, since the slots live as long as the ring.
        """
        with torch.cuda.stream(self.copies):
            self.slots[slot][first : first + len(master)].copy_(master, non_blocking=True)
            self.filled[slot].record(self.copies)

    def ready(self, slot: int) -> None:
        torch.cuda.current_stream(self.slots[slot].device).wait_event(self.filled[slot])


class StagedStreams(CudaStreams):
    """Copies from memory that is not or only partly pinned: a thread moves unpinned bytes through pinned buffers.

    The CPU makes an additional copy, so the speed of main memory limits such a block. If not even the buffers can be
    pinned, the driver stages the bytes and the thread waits for it.
    """

    def __init__(
        self, num_slots: int, num_bytes: int, device: torch.device, pinned: Collection[int] = (), piece: int = PIECE
    ) -> None:
        """`pinned` has the addresses of the masters that are copied directly."""
        super().__init__(num_slots, num_bytes, device)
        self.pinned, self.piece = pinned, piece
        self.staging = staging_buffers(min(piece, num_bytes))
        # Recorded when the GPU has read the buffer. The events are blocking, so that the waiting thread does not occupy
        # a core.
        self.read_events = [torch.cuda.Event(blocking=True) for _ in self.staging]  # type: ignore[no-untyped-call]
        self.next_buffer = 0
        self.worker = ThreadPoolExecutor(1, "weights")
        self.pending: dict[int, Future[None]] = {}

    def start(self, slot: int, master: Tensor) -> None:
        # The event is recorded here because every thread has a current stream of its own.
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self.slots[slot].device))
        # Pinned masters use the thread too, so that copies are queued in the order of the requests.
        self.pending[slot] = self.worker.submit(self.stage, slot, master, free)

    def stage(self, slot: int, master: Tensor, free: torch.cuda.Event) -> None:
        """Copy one block; a single thread runs these in the order of the requests."""
        self.copies.wait_event(free)
        if not self.staging or master.data_ptr() in self.pinned:
            self.copy(slot, master)
            return
        for first in range(0, len(master), self.piece):
            i, self.next_buffer = self.next_buffer, (self.next_buffer + 1) % NUM_STAGING
            self.read_events[i].synchronize()  # the only wait, and it blocks only this thread
            part = master[first : first + self.piece]
            staged = self.staging[i][: len(part)].copy_(part)
            self.copy(slot, staged, first)
            self.read_events[i].record(self.copies)

    def ready(self, slot: int) -> None:
        self.pending[slot].result()
        super().ready(slot)


def staging_bytes(num_bytes: int) -> int:
    """Return the bytes of the staging buffers for blocks of up to `num_bytes`. torch rounds each to a power of two."""
    return NUM_STAGING * rounded_size(min(PIECE, num_bytes))


def staging_buffers(num_bytes: int) -> list[Tensor]:
    """Return pinned buffers, or an empty list if the system refuses them."""
    buffers = [
        try_to_pin(lambda: torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)) for _ in range(NUM_STAGING)
    ]
    pinned = [buffer for buffer in buffers if buffer is not None]
    return pinned if len(pinned) == NUM_STAGING else []
