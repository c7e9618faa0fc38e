"""Bytes of frozen weights in any format and place, from their shapes alone."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from torch import Tensor, nn

from library.memory.codecs.weight_format import load_format
from library.memory.devices import bytes_of
from library.memory.frozen import FrozenLayer
from library.memory.offload.ring import NUM_SLOTS


@dataclass(frozen=True)
class Matrix:
    """A weight, a convolution's with its inputs and its kernel on one axis."""

    rows: int
    columns: int
    itemsize: int  # bytes of a value in the precision of the run
    stored_bytes: int | None = None  # where the file has it in 8 bits and nothing else is asked for

    @classmethod
    def of(cls, weight: Tensor) -> "Matrix":
        return cls(weight.shape[0], weight.numel() // weight.shape[0], weight.element_size())

    @classmethod
    def of_layer(cls, layer: nn.Module) -> "Matrix":
        if isinstance(layer, FrozenLayer):
            shape, parts = layer.weight_shape, layer.own_parts().values()
            stored = sum(part.numel() * part.element_size() for part in parts)
            return cls(shape[0], shape.numel() // shape[0], layer.weight_dtype.itemsize, stored)
        assert isinstance(layer.weight, Tensor)
        return cls.of(layer.weight)

    @property
    def own_bytes(self) -> int:
        """As it comes from the file."""
        return self.plain_bytes if self.stored_bytes is None else self.stored_bytes

    @property
    def num_values(self) -> int:
        return self.rows * self.columns

    @property
    def plain_bytes(self) -> int:
        return self.num_values * self.itemsize


@dataclass(frozen=True)
class StorageCost:
    """The cost of storing weights in a format; the fields are those of `WeightFormat`."""

    num_bytes: Callable[[Matrix], int]
    num_copies: float
    slowdown: float

    @classmethod
    def of(cls, name: str | None) -> "StorageCost":
        """The cost of a value of --base_format.

        None stands for weights in --mixed_precision or as the file has them; decoding those is counted with the step.
        """
        if name is None:
            return cls(lambda matrix: matrix.own_bytes, 0, 1.0)
        found = load_format(name)
        return cls(
            lambda matrix: found.num_bytes(matrix.rows, matrix.columns, matrix.itemsize),
            found.num_copies,
            found.slowdown,
        )

    def of_8bit_matmul(self) -> "StorageCost":
        """The cost where 8-bit codes are multiplied as they are; those products are counted with the step.

        GPUs need a copy of the codes in another order for gradients: half as much as a decoded weight in 16 bits.
        """
        return replace(self, num_copies=0.5, slowdown=1.0)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model by what can be done with them."""

    fixed_bytes: int  # of what keeps its format and place: embedders, norms, biases
    storable: tuple[Matrix, ...]  # that are stored in the weight format and stay where they are
    blocks: tuple[tuple[Matrix, ...], ...]  # that can wait in main memory too, by the place of their block

    @classmethod
    def of(cls, model: nn.Module, storable: Iterable[nn.Module], blocks: Sequence[nn.Module]) -> "ModelWeights":
        """`storable` are all layers that may be stored in a weight format; those in `blocks` may wait."""
        layers = {layer: Matrix.of_layer(layer) for layer in storable}
        by_block = [[layer for layer in block.modules() if layer in layers] for block in blocks]
        inside = {layer for found in by_block for layer in found}
        fixed = bytes_of(model) - sum(matrix.own_bytes for matrix in layers.values())
        return cls(
            fixed,
            tuple(matrix for layer, matrix in layers.items() if layer not in inside),
            tuple(tuple(layers[layer] for layer in found) for found in by_block),
        )

    def block_bytes(self, cost: StorageCost) -> list[int]:
        """Bytes of the weights of each block that can wait."""
        return [sum(map(cost.num_bytes, block)) for block in self.blocks]

    def resident_bytes(self, cost: StorageCost, waiting: Collection[int]) -> int:
        """Bytes on the device with the blocks at some places in main memory, the slots for them included."""
        sizes = self.block_bytes(cost)
        staying = sum(size for place, size in enumerate(sizes) if place not in waiting)
        slots = NUM_SLOTS * max((sizes[place] for place in waiting), default=0)
        return self.fixed_bytes + sum(map(cost.num_bytes, self.storable)) + staying + slots

    def shared_bytes(self, cost: StorageCost, num_processes: int) -> int:
        """Bytes on one device where the weights lie spread over as many.

        Beside the share two blocks are together at a time, and one of them is there twice while it comes.
        """
        sizes = [*self.block_bytes(cost), *map(cost.num_bytes, self.storable)]
        return self.fixed_bytes + ceil(sum(sizes) / num_processes) + (NUM_SLOTS + 1) * max(sizes, default=0)

    def decoded_bytes(self, cost: StorageCost) -> int:
        """The most that decoding one weight takes for a moment."""
        matrices = [*self.storable, *(matrix for block in self.blocks for matrix in block)]
        return round(cost.num_copies * max((matrix.plain_bytes for matrix in matrices), default=0))
