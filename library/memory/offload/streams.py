"""How bytes get from main memory into the slots of a ring while the device computes.

Every one of these keeps two promises. `start(slot, master)` begins to fill a slot once all work that the device was
given so far is done, so what still reads the slot's old bytes does. After `ready(slot)` whatever the device is given
sees the slot filled.
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
    """Slots on the device, and a way to fill them."""

    slots: list[SlotT]

    def start(self, slot: int, master: MasterT) -> None: ...
    def ready(self, slot: int) -> None: ...


class HostStreams:
    """For devices without streams of copies: a slot is copied when it is waited for.

    Until then it holds NaN, so that a block which is used after its slot was given away shows at once.
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
    """Copies from pinned memory by a stream of their own, beside the arithmetic; the host waits for nothing."""

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
        """Give the copy to its stream."""
        with torch.cuda.stream(self.copies):
            self.slots[slot][: len(master)].copy_(master, non_blocking=True)
            self.filled[slot].record(self.copies)

    def ready(self, slot: int) -> None:
        torch.cuda.current_stream(self.slots[slot].device).wait_event(self.filled[slot])


class StagedStreams(CudaStreams):
    """The same from memory that could not be pinned: a thread brings the bytes into a pinned buffer first.

    The bytes are copied twice, once by the processor, so a block takes about as long as its memory allows.
    """

    def __init__(self, num_slots: int, num_bytes: int, device: torch.device) -> None:
        super().__init__(num_slots, num_bytes, device)
        self.staging = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGING)]
        self.left = [torch.cuda.Event() for _ in self.staging]  # type: ignore[no-untyped-call]  # the card has read it
        self.turn = 0
        self.worker = ThreadPoolExecutor(1, "weights")
        self.given: dict[int, Future[None]] = {}

    def start(self, slot: int, master: Tensor) -> None:
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self.slots[slot].device))
        self.given[slot] = self.worker.submit(self.stage, slot, master, free)

    def stage(self, slot: int, master: Tensor, free: torch.cuda.Event) -> None:
        """What the thread does: the copies of one block, in the order in which they were asked for."""
        i, self.turn = self.turn, (self.turn + 1) % NUM_STAGING
        self.left[i].synchronize()  # the only wait, and it is this thread's
        staged = self.staging[i][: len(master)].copy_(master)
        self.copies.wait_event(free)
        self.copy(slot, staged)
        self.left[i].record(self.copies)

    def ready(self, slot: int) -> None:
        self.given[slot].result()
        super().ready(slot)
