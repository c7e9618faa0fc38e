"""A ring of slots on the device through which a model's blocks pass: one computes while the next ones are copied."""

from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

from library.memory.offload.streams import Streams

NUM_SLOTS = 2  # by default: one for the block that computes, one for the block being fetched
MOST_DIGEST = 2**20  # float32 represents integers up to this exactly

MasterT = TypeVar("MasterT")
SlotT = TypeVar("SlotT")


class Ring(Generic[MasterT, SlotT]):
    """Provider of the bytes of one block at a time, which prefetches the next blocks into the other slots.

    Blocks are numbered. A block's bytes are valid until another block is requested. The next block depends on the
    direction of the pass, so the ring learns the order: after 2, 3 came 4; after 4, 3 came 2. A wrong guess, as in the
    first step, costs the time of a copy. With a single slot nothing is prefetched.
    """

    def __init__(self, masters: Sequence[MasterT], streams: Streams[MasterT, SlotT]) -> None:
        """`masters` are the offloaded blocks, for example as flat bytes in main memory."""
        self.masters = masters
        self.streams = streams
        self.held: list[int | None] = [None] * len(streams.slots)  # the block that a slot holds or is receiving
        self.now: int | None = None
        self.before: int | None = None
        self.followers: dict[tuple[int | None, int | None], int] = {}
        self.num_missed = 0  # blocks that were not prefetched
        self.digest = 0  # hash of all requested blocks, in order
        self.on_request: Callable[[int], None] | None = None  # called with each block before it is fetched

    def need(self, block: int) -> SlotT:
        """Return the slot that holds a block, on the device."""
        if block != self.now:
            self.advance_to(block)
        return self.streams.slots[self.held.index(block)]

    def advance_to(self, block: int) -> None:
        """Release the block that has computed, and prefetch the next blocks into the slots that are free."""
        if self.on_request is not None:
            # The fetch of a sharded block is a collective, for which the other processes have to know the block.
            self.on_request(block)
        self.digest = (31 * self.digest + block + 1) % MOST_DIGEST
        self.followers[self.before, self.now] = block
        if block not in self.held:
            self.num_missed += 1
            # A single slot is reused as soon as its block has computed.
            self.fetch(block, keep=[self.now] if len(self.held) > 1 else [])
        self.streams.ready(self.held.index(block))
        self.before, self.now = self.now, block
        upcoming = self.guess_upcoming()
        for following in upcoming:
            if following not in self.held:
                self.fetch(following, keep=[block, *upcoming])

    def guess_upcoming(self) -> list[int]:
        """Return the blocks that are expected next, as many as there are slots beside the current block's."""
        upcoming: list[int] = []
        before, now = self.before, self.now
        while len(upcoming) < len(self.held) - 1 and now is not None:
            before, now = now, self.followers.get((before, now), now + 1)
            if now == len(self.masters) or now in (self.now, *upcoming):
                break  # the end of a pass that was not seen yet, or the turn between two passes
            upcoming.append(now)
        return upcoming

    def fetch(self, block: int, keep: Collection[int | None]) -> None:
        """Start copying a block into a slot that is empty or whose block is not in `keep`."""
        slot = next(i for i, held in enumerate(self.held) if held is None or held not in keep)
        self.held[slot] = block
        self.streams.start(slot, self.masters[block])
