"""Copies from main memory into the slots of a ring while the device computes.

Every implementation keeps two promises. `start(slot, master)` fills a slot only after all work queued on the device so
far is done, including reads of the slot's old bytes. Work queued after `ready(slot)` sees the slot filled.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

NUM_STAGING = 2
NAN_BYTE = 0xFF  # repeated, it is NaN in every floating-point format


MasterT = TypeVar("MasterT", contravariant=True)
SlotT = TypeVar("SlotT")


class Streams(Protocol[MasterT, SlotT]):
    """Slots on the device, and the copies that fill them."""

    slots: list[SlotT]

    def start(self, slot: int, master: MasterT) -> None: ...
    def ready(self, slot: int) -> None: ...


class HostStreams:
    """Slots for devices without copy streams: a slot is copied when it is waited for.

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
    """Copies from pinned memory on a stream of their own, in parallel with computing; the host waits for nothing."""

    def __init__(self, num_slots: int, num_bytes: int, device: torch.device) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(num_slots)]
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.filled = [torch.cuda.Event() for _ in self.slots]  # type: ignore[no-untyped-call]
        for slot in self.slots:
            slot.record_stream(self.copies)  # a ring may be dropped while its last copy is under way

    def start(self, slot: int, master: Tensor) -> None:
        self.copies.wait_stream(torch.cuda.current_stream(self.slots[slot].device))
        self.copy(slot, master)

    def copy(self, slot: int, master: Tensor) -> None:
        """Queue the copy on its stream; the allocator need not know, because the slots live as long as the ring."""
        with torch.cuda.stream(self.copies):
            self.slots[slot][: len(master)].copy_(master, non_blocking=True)
            self.filled[slot].record(self.copies)

    def ready(self, slot: int) -> None:
        torch.cuda.current_stream(self.slots[slot].device).wait_event(self.filled[slot])


class StagedStreams(CudaStreams):
    """Copies from memory that could not be pinned: a thread first moves the bytes into a pinned buffer.

    The processor copies every byte once more, so the speed of main memory limits a block.
    """

    def __init__(self, num_slots: int, num_bytes: int, device: torch.device) -> None:
        super().__init__(num_slots, num_bytes, device)
        self.staging = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGING)]
        # Recorded when the GPU has read the buffer.
        self.left = [torch.cuda.Event() for _ in self.staging]  # type: ignore[no-untyped-call]
        self.turn = 0
        self.worker = ThreadPoolExecutor(1, "weights")
        self.given: dict[int, Future[None]] = {}

    def start(self, slot: int, master: Tensor) -> None:
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self.slots[slot].device))
        self.given[slot] = self.worker.submit(self.stage, slot, master, free)

    def stage(self, slot: int, master: Tensor, free: torch.cuda.Event) -> None:
        """Copy one block; a single thread runs these in the order of the requests."""
        i, self.turn = self.turn, (self.turn + 1) % NUM_STAGING
        self.left[i].synchronize()  # the only wait, and it blocks only this thread
        staged = self.staging[i][: len(master)].copy_(master)
        self.copies.wait_event(free)
        self.copy(slot, staged)
        self.left[i].record(self.copies)

    def ready(self, slot: int) -> None:
        self.given[slot].result()
        super().ready(slot)
