"""Frozen weights sharded over processes: each process keeps a shard, and a block is gathered only while it computes.

Torch's FSDP holds the shards. Each block has a companion module outside the model whose parameters are the bytes of the
block's layers, and `fully_shard` shards these. The model keeps its class names, hooks and adapters. Its layers fetch
their weights through a handle, like offloaded ones.

Gathering a block is a collective of all processes that share it, so all of them must request the same blocks in the
same order. If one process computes alone, the others `follow` it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.memory.blocks import Stacks
from library.memory.codecs.codec import Parts
from library.memory.frozen import FrozenLayer, frozen_layers
from library.memory.offload.ring import NUM_SLOTS, Ring
from library.memory.offload.spans import ALIGNMENT, Span, parts_in, spans

if TYPE_CHECKING:
    from torch.distributed.fsdp import UnshardHandle

NOBODY = -1  # sent instead of a block's number when the leader is done

# Peak memory in sizes of the largest block, measured with two processes on the CPU: two blocks are gathered, the
# arriving one exists twice, and the collective has its own buffers.
PEAK_BLOCKS = 3.6


class ShardedBlock(nn.Module):
    """The bytes of one block's layers, sharded over the processes of a mesh."""

    def __init__(self, shares: Sequence[Any], mesh: Any) -> None:
        """`shares` are distributed tensors of bytes, one per layer."""
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        for number, share in enumerate(shares):
            # Placeholders on the meta device, so that no process holds the whole block.
            placeholder = torch.empty(share.shape, dtype=torch.uint8, device="meta")
            self.register_parameter(f"layer_{number}", nn.Parameter(placeholder, requires_grad=False))
        fully_shard(self, mesh=mesh)
        self.load_state_dict({f"layer_{number}": share for number, share in enumerate(shares)}, assign=True)

    def begin(self) -> "UnshardHandle":
        """Start gathering the bytes."""
        return cast("UnshardHandle", cast(Any, self).unshard(async_op=True))

    def whole(self) -> list[Tensor]:
        """Return the gathered bytes of each layer."""
        return [parameter.detach() for parameter in self.parameters()]

    def part(self) -> None:
        """Free everything except this process's shard."""
        cast(Any, self).reshard()


class GatheredStreams:
    """Slots that hold gathered blocks; on GPUs a gather overlaps with computing."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[list[Tensor]] = [[] for _ in range(num_slots)]
        self.held: list[ShardedBlock | None] = [None] * num_slots
        self.coming: dict[int, UnshardHandle] = {}

    def start(self, slot: int, master: ShardedBlock) -> None:
        self.slots[slot] = []
        self.arrived(slot)  # a prefetched block that was never requested
        old = self.held[slot]
        if old is not None:
            old.part()
        self.held[slot] = master
        self.coming[slot] = master.begin()

    def ready(self, slot: int) -> None:
        self.arrived(slot)
        block = self.held[slot]
        assert block is not None
        self.slots[slot] = block.whole()

    def arrived(self, slot: int) -> None:
        arrival = self.coming.pop(slot, None)
        if arrival is not None:
            arrival.wait()


@dataclass(frozen=True)
class ShardedHandle:
    """Handle of a layer whose weight is sharded by block."""

    ring: Ring[ShardedBlock, list[Tensor]]
    number: int  # index of its block in the ring
    layer_index: int  # index among the layers of the block
    layout: Sequence[Span]

    def __call__(self) -> Parts:
        return parts_in(self.layout, self.ring.need(self.number)[self.layer_index])

    def copied(self, device: torch.device) -> Parts:
        """Return copies of the parts, which stay valid when other blocks are fetched."""
        return {name: part.clone() for name, part in self().items()}


@dataclass(frozen=True)
class Share:
    """Handle of a layer whose sharded weight is not part of a block yet. Each call gathers the weight."""

    layout: Sequence[Span]
    bytes: Any  # a distributed tensor of bytes

    def __call__(self) -> Parts:
        return parts_in(self.layout, self.bytes.full_tensor())


@dataclass
class ShardedModel:
    """The frozen layers of one model, sharded over the processes of a group.

    If there are several groups, each holds a whole copy of the model: machines with a slow network exchange only
    gradients.
    """

    device: torch.device
    num_processes: int
    group_size: int  # processes that share one copy
    shares: dict[FrozenLayer, Share] = field(default_factory=dict)
    ring: Ring[ShardedBlock, list[Tensor]] | None = None
    sizes: list[int] = field(default_factory=list)  # bytes of each block

    @cached_property
    def mesh(self) -> Any:
        """Torch's device mesh. Creating it is a collective: every process must call it."""
        from torch.distributed.device_mesh import init_device_mesh

        num_groups = self.num_processes // self.group_size
        if num_groups == 1:
            return init_device_mesh(self.device.type, (self.num_processes,), mesh_dim_names=("shard",))
        sizes = num_groups, self.group_size
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard"))

    @property
    def group(self) -> Any:
        """The processes that share this copy of the model."""
        return self.mesh.get_group("shard")

    @property
    def has_main(self) -> bool:
        """True if the main process belongs to this group."""
        return 0 in dist.get_process_group_ranks(self.group)

    def keep_shard(self, layer: nn.Module) -> None:
        """Keep only this process's shard of a frozen layer's weight. All processes must call it in the same order."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        assert isinstance(layer, FrozenLayer)
        if layer in self.shares:
            return
        layout = list(spans([layer]))
        num_bytes = padded(layout[-1].end, ALIGNMENT * self.group_size)
        # As bytes, weights in every format can be sharded.
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        for span in layout:
            span.within(buffer).copy_(layer.own_parts()[span.name])
            delattr(layer, span.name)
        length = num_bytes // self.group_size
        start = self.mesh.get_local_rank("shard") * length
        # A view would keep the whole weight in memory.
        shard = buffer[start : start + length].clone().to(self.device)
        placements = [Replicate()] * (self.mesh.ndim - 1) + [Shard(0)]
        distributed = DTensor.from_local(shard, self.mesh, placements, run_check=False, shape=buffer.shape, stride=(1,))
        self.shares[layer] = Share(layout, distributed)
        layer.handle = self.shares[layer]

    def resolve(self, stacks: Stacks) -> None:
        """Group the shards by block. A layer outside the blocks of `stacks` becomes a separate block."""
        blocks = [
            [layer for layer in frozen_layers(block) if layer in self.shares] for stack in stacks for block in stack
        ]
        inside = {layer for layers in blocks for layer in layers}
        blocks += [[layer] for layer in self.shares if layer not in inside]
        blocks = [layers for layers in blocks if layers]
        self.sizes = [sum(self.shares[layer].bytes.numel() for layer in layers) for layers in blocks]
        sharded_blocks = [ShardedBlock([self.shares[layer].bytes for layer in layers], self.mesh) for layers in blocks]
        self.ring = Ring(sharded_blocks, GatheredStreams(NUM_SLOTS))
        for number, layers in enumerate(blocks):
            for layer_index, layer in enumerate(layers):
                layer.handle = ShardedHandle(self.ring, number, layer_index, self.shares.pop(layer).layout)

    @property
    def digest(self) -> int:
        """Hash of the requested blocks, in order; equal in all processes of a group."""
        assert self.ring is not None
        return self.ring.digest

    @property
    def num_blocks(self) -> int:
        """Number of units that are gathered at a time: blocks, and layers outside of blocks."""
        return len(self.sizes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all sharded weights."""
        return sum(self.sizes)

    @property
    def most_bytes(self) -> int:
        return max(self.sizes)

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Let this process compute alone inside the block, while the others of its group call `follow`."""
        assert self.ring is not None
        self.ring.on_request = self.broadcast_request
        try:
            yield
        finally:
            self.ring.on_request = None
            # Also after an error, because the followers wait for the next number.
            self.broadcast_request(NOBODY)

    def broadcast_request(self, number: int) -> None:
        """Broadcast the number of the requested block to the followers."""
        dist.broadcast(torch.tensor([number], device=self.device), dist.get_rank(), group=self.group)

    def follow(self, leader: int) -> None:
        """Gather the blocks that the leader requests, until it is done."""
        assert self.ring is not None
        message = torch.zeros(1, dtype=torch.int64, device=self.device)
        while True:
            dist.broadcast(message, leader, group=self.group)
            number = int(message)
            if number == NOBODY:
                return
            self.ring.need(number)


def padded(size: int, step: int) -> int:
    return -(-size // step) * step
