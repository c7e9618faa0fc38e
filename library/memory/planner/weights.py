"""Bytes of frozen weights in any format and location, computed from their shapes alone."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import ceil

from torch import Tensor, nn

from library.memory.codecs.weight_format import load_format
from library.memory.devices import bytes_of
from library.memory.frozen import FrozenLayer
from library.memory.offload.ring import NUM_SLOTS
from library.memory.offload.sharded import PEAK_BLOCKS


@dataclass(frozen=True)
class Matrix:
    """The size of a weight as a matrix. The inputs and the kernel of a convolution form one axis."""

    rows: int
    columns: int
    itemsize: int  # bytes per value in the precision of the run
    stored_bytes: int | None = None  # if the file stores it in 8 bits and no other format is requested

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
        """The bytes as stored in the file."""
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
    error: float | None = None

    @classmethod
    def of(cls, name: str | None) -> "StorageCost":
        """Return the cost of a value of --base_format.

        None means weights in --mixed_precision or as in the file; the decoding of the latter is counted with the step.
        """
        if name is None:
            return cls(lambda matrix: matrix.own_bytes, 0, 1.0)
        weight_format = load_format(name)
        return cls(
            lambda matrix: weight_format.num_bytes(matrix.rows, matrix.columns, matrix.itemsize),
            weight_format.num_copies,
            weight_format.slowdown,
            weight_format.error,
        )

    def of_8bit_matmul(self) -> "StorageCost":
        """Return the cost with 8-bit products, which are counted with the step."""
        # For gradients GPUs need a transposed copy of the codes: half as large as a weight decoded to 16 bits.
        return replace(self, num_copies=0.5, slowdown=1.0)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model, grouped by how they can be stored."""

    fixed_bytes: int  # of parameters with a fixed format and location: embedders, norms, biases
    storable: tuple[Matrix, ...]  # stored in the weight format but never offloaded
    blocks: tuple[tuple[Matrix, ...], ...]  # stored in the weight format and offloadable, by block

    @classmethod
    def of(cls, model: nn.Module, storable: Iterable[nn.Module], blocks: Sequence[nn.Module]) -> "ModelWeights":
        """Group the weights of a model.

        `storable` are all layers that can be stored in a weight format. Those in `blocks` can also be offloaded.
        """
        layers = {layer: Matrix.of_layer(layer) for layer in storable}
        by_block = [[layer for layer in block.modules() if layer in layers] for block in blocks]
        inside = {layer for block_layers in by_block for layer in block_layers}
        fixed = bytes_of(model) - sum(matrix.own_bytes for matrix in layers.values())
        return cls(
            fixed,
            tuple(matrix for layer, matrix in layers.items() if layer not in inside),
            tuple(tuple(layers[layer] for layer in block_layers) for block_layers in by_block),
        )

    # A model has few kinds of matrices, and a search computes their bytes thousands of times.
    @cached_property
    def _counts(self) -> tuple[Counter[Matrix], list[Counter[Matrix]]]:
        return Counter(self.storable), [Counter(block) for block in self.blocks]

    @cached_property
    def _largest_bytes(self) -> int:
        return max((matrix.plain_bytes for matrix in (*self.storable, *chain(*self.blocks))), default=0)

    def block_bytes(self, cost: StorageCost) -> list[int]:
        return [bytes_of_all(counts, cost) for counts in self._counts[1]]

    def resident_bytes(self, cost: StorageCost, offloaded: Collection[int], num_slots: int = NUM_SLOTS) -> int:
        """Return the bytes on the device with the blocks in `offloaded` offloaded, including their slots."""
        sizes = self.block_bytes(cost)
        resident = sum(size for i, size in enumerate(sizes) if i not in offloaded)
        # Every slot has the size of the largest offloaded block.
        slots = num_slots * max((sizes[i] for i in offloaded), default=0)
        return self.fixed_bytes + bytes_of_all(self._counts[0], cost) + resident + slots

    def shared_bytes(self, cost: StorageCost, num_processes: int) -> int:
        """Return the bytes on one device if the weights are sharded over `num_processes`."""
        sizes = [*self.block_bytes(cost), *map(cost.num_bytes, self.storable)]
        return self.fixed_bytes + ceil(sum(sizes) / num_processes + PEAK_BLOCKS * max(sizes, default=0))

    def decoded_bytes(self, cost: StorageCost) -> int:
        """Return the peak bytes of decoding one weight."""
        # Layers decode their weight for each computation and keep no copy, so that only one is decoded at a time.
        return round(cost.num_copies * self._largest_bytes)


def bytes_of_all(counts: Mapping[Matrix, int], cost: StorageCost) -> int:
    return sum(count * cost.num_bytes(matrix) for matrix, count in counts.items())
