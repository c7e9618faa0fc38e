"""Which blocks of a denoiser can wait in main memory, by their places among the blocks that were counted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from library.errors import UserError
from library.memory.blocks import Stacks
from library.memory.offload.streamed import chosen
from library.training.models.frozen_base import offloaded_blocks


@dataclass(frozen=True)
class OffloadedBlocks:
    """The blocks that a number of offloaded blocks stands for."""

    stacks: Stacks
    blocks: Sequence[nn.Module]  # in the order in which they run

    def places(self, num_blocks: int) -> Collection[int]:
        """Return the places of the blocks that are offloaded."""
        if num_blocks == 0:
            return ()
        places = {block: place for place, block in enumerate(self.blocks)}
        counts = offloaded_blocks(num_blocks, self.stacks)
        waiting = [
            stack[i] for stack, count in zip(self.stacks, counts, strict=True) for i in chosen(len(stack), count)
        ]
        return [places[block] for block in waiting]

    @property
    def most(self) -> int:
        """The largest number that is allowed."""
        number = 0
        while self.allows(number + 1):
            number += 1
        return number

    def allows(self, num_blocks: int) -> bool:
        try:
            offloaded_blocks(num_blocks, self.stacks)
        except UserError:
            return False
        return True
