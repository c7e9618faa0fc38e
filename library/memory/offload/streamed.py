"""Offloading of a frozen model's blocks to main memory until they compute."""

import logging
import mmap
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.memory.blocks import Stacks
from library.memory.codecs.codec import Parts
from library.memory.frozen import frozen_layers
from library.memory.offload.pinning import pin
from library.memory.offload.ring import NUM_SLOTS, Ring
from library.memory.offload.spans import Span, parts_in, spans
from library.memory.offload.streams import CudaStreams, HostStreams, StagedStreams, Streams, staging_bytes

logger = logging.getLogger(__name__)

MakeMaster = Callable[[int, int], tuple[Tensor, bool]]
"""(block number, bytes) -> (flat master, True if another process fills it)."""


def allocate_own_master(block: int, num_bytes: int) -> tuple[Tensor, bool]:
    """Allocate a master for this process alone, which forked processes do not inherit."""
    # At a fork Linux copies pages that are pinned for a device instead of sharing them. Eight workers of a data loader
    # would need eight copies of all offloaded blocks.
    if num_bytes == 0 or sys.platform != "linux":
        return torch.empty(num_bytes, dtype=torch.uint8), False
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=torch.uint8), False


def stream(
    stacks: Stacks,
    num_offloaded: Sequence[int],
    device: torch.device,
    make_master: MakeMaster = allocate_own_master,
    num_slots: int = NUM_SLOTS,
    pinned_share: float = 1.0,
) -> Ring[Tensor, Tensor] | None:
    """Keep `num_offloaded[i]` blocks of stack i in main memory, and provide their weights through slots on `device`.

    They take at most `pinned_share` of the memory that can be pinned.

    The weights of these blocks must be frozen, see `library.memory.frozen`. Norms, biases and all other parameters stay
    on the model's device. Return the ring, or None if no block is offloaded.
    """
    counts = zip(stacks, num_offloaded, strict=True)
    blocks = [stack[i] for stack, count in counts for i in choose_blocks(len(stack), count)]
    if not blocks:
        return None
    layouts = [list(spans(frozen_layers(block))) for block in blocks]
    masters = [move_to_master(number, layout, make_master) for number, layout in enumerate(layouts)]
    ring = Ring(masters, open_streams(masters, device, num_slots, pinned_share))
    for number, layout in enumerate(layouts):
        for layer in {span.layer: None for span in layout}:
            layer.handle = OffloadedHandle(ring, number, [span for span in layout if span.layer is layer])
    return ring


def choose_blocks(num_blocks: int, count: int) -> list[int]:
    """Return the indices of the blocks to offload: evenly spread, so that others compute during a copy.

    The last block is never among them.
    """
    # The backward pass needs the last block at once, which leaves no time to fetch it.
    return [i * (num_blocks - 1) // count for i in range(count)]


def bytes_of_parts(block: nn.Module) -> int:
    """Return the bytes of a block's frozen weights."""
    return sum(p.numel() * p.element_size() for layer in frozen_layers(block) for p in layer.own_parts().values())


def move_to_master(number: int, layout: Sequence[Span], make_master: MakeMaster) -> Tensor:
    """Move the parts of a block from its layers into a master and return it."""
    master, is_filled = make_master(number, layout[-1].end if layout else 0)
    for span in layout:
        if not is_filled:
            span.within(master).copy_(span.layer.own_parts()[span.name])
        # Part by part, so that a block is never in memory twice.
        delattr(span.layer, span.name)
    return master


@dataclass(frozen=True)
class OffloadedHandle:
    """Handle of a layer whose block is offloaded to main memory."""

    ring: Ring[Tensor, Tensor]
    number: int  # index of the block in the ring
    layout: Sequence[Span]

    def __call__(self) -> Parts:
        """Return the parts in the block's slot."""
        return parts_in(self.layout, self.ring.need(self.number))

    def copied(self, device: torch.device) -> Parts:
        """Copy the parts directly from main memory, without the ring."""
        return {name: part.to(device) for name, part in parts_in(self.layout, self.ring.masters[self.number]).items()}


def pinned_bytes(model: nn.Module) -> int:
    """Return the bytes of pinned memory that hold a model's offloaded blocks."""
    handles = [layer.handle for layer in frozen_layers(model)]
    rings = {id(handle.ring): handle.ring for handle in handles if isinstance(handle, OffloadedHandle)}
    return sum(len(master) for ring in rings.values() for master in ring.masters if master.is_pinned())


def open_streams(
    masters: Sequence[Tensor], device: torch.device, num_slots: int = NUM_SLOTS, pinned_share: float = 1.0
) -> Streams[Tensor, Tensor]:
    """Open the fastest streams from these masters to the device, and log the choice."""
    largest, total = max(map(len, masters)), sum(map(len, masters))
    summary = f"{len(masters)} blocks ({total / 1e9:.2f} GB) are offloaded to main memory"
    if device.type != "cuda":
        logger.info("%s; without a GPU this saves nothing and copies each block in every pass", summary)
        return HostStreams(num_slots, largest, device)
    pinned = pin(masters, staging_bytes(largest), pinned_share)
    if pinned.reason is None:
        logger.info("%s (pinned): they are copied while others compute", summary)
        return CudaStreams(num_slots, largest, device)
    unpinned_sizes = [len(master) for master in masters if master.data_ptr() not in pinned.addresses]
    logger.warning(
        "%s, of which %d (%.2f GB) cannot be pinned: %s. These are copied twice, which can take longer than computing "
        "the others",
        summary,
        len(unpinned_sizes),
        sum(unpinned_sizes) / 1e9,
        pinned.reason,
    )
    return StagedStreams(num_slots, largest, device, pinned.addresses)
