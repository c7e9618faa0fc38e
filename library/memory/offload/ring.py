"""A ring of slots on the device through which the blocks of a model pass, one computing while the next one comes."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from library.memory.offload.streams import Streams

NUM_SLOTS = 2  # one for the block that computes, one for the block that comes
MOST_DIGEST = 2**20  # which float32 holds exactly

MasterT = TypeVar("MasterT")
SlotT = TypeVar("SlotT")


class Ring(Generic[MasterT, SlotT]):
    """Gives the bytes of one block at a time, wherever it waits, and fetches the one that comes after it.

    Blocks are numbered. A block's bytes are good until another block is asked for. Which block comes next depends on
    where the pass comes from, forward or backward, so the ring learns it: after block 3 came block 4 where 2 was
    before, and 2 where 4 was before. A guess that was wrong, as in the first step, costs the time of a copy.
    """

    def __init__(self, masters: Sequence[MasterT], streams: Streams[MasterT, SlotT]) -> None:
        """`masters` are where the blocks wait, one for each, such as flat bytes in main memory."""
        self.masters = masters
        self.streams = streams
        self.held: list[int | None] = [None] * NUM_SLOTS  # the block that a slot has, or is getting
        self.now: int | None = None
        self.before: int | None = None
        self.followers: dict[tuple[int | None, int | None], int] = {}
        self.num_missed = 0  # blocks that had not been fetched when they were asked for
        self.digest = 0  # of all blocks that were asked for, in order
        self.turns: Callable[[int], None] | None = None  # is told of each block before it is fetched

    def need(self, block: int) -> SlotT:
        """The slot that has a block, on the device."""
        if block != self.now:
            self.turn_to(block)
        return self.streams.slots[self.held.index(block)]

    def turn_to(self, block: int) -> None:
        """Be done with the block that computed, and fetch the one that will come after this one into its slot."""
        if self.turns is not None:
            self.turns(block)
        self.digest = (31 * self.digest + block + 1) % MOST_DIGEST
        self.followers[self.before, self.now] = block
        if block not in self.held:
            self.num_missed += 1
            self.fetch(block)
        self.streams.ready(self.held.index(block))
        self.before, self.now = self.now, block
        following = self.followers.get((self.before, self.now), block + 1)
        if following < len(self.masters) and following not in self.held:
            self.fetch(following)

    def fetch(self, block: int) -> None:
        """Begin to bring a block into the slot whose block does not compute."""
        slot = next(i for i in range(NUM_SLOTS) if self.now is None or self.held[i] != self.now)
        self.held[slot] = block
        self.streams.start(slot, self.masters[block])
