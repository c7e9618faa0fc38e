"""Bytes of frozen weights in any form and place, from their shapes alone."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from torch import Tensor, nn

from library.memory.frozen import FrozenLayer
from library.memory.offload.ring import NUM_SLOTS


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """The parameters and buffers of some modules; one that several have comes once."""
    return list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of some modules."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(*modules))


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
class StoredForm:
    """What storing weights in a form costs."""

    num_bytes: Callable[[Matrix], int]
    num_copies: float  # of a decoded weight at once while it is decoded; none where it is used as it lies
    slowdown: float  # of the arithmetic, by decoding [derived, see docs/memory.md; no card has confirmed it]


def nf4_bytes(matrix: Matrix) -> int:
    """Two values to a byte, a float32 factor for each 64."""
    return ceil(matrix.num_values / 2) + 4 * ceil(matrix.num_values / 64)


def nf4_double_bytes(matrix: Matrix) -> int:
    """The same with factors of a byte, a float32 for each 256 of them and one for their mean."""
    num_factors = ceil(matrix.num_values / 64)
    return ceil(matrix.num_values / 2) + num_factors + 4 * ceil(num_factors / 256) + 4


def int8_bytes(matrix: Matrix) -> int:
    """A byte a value, a float32 factor a row."""
    return matrix.num_values + 4 * matrix.rows


OWN = StoredForm(lambda matrix: matrix.own_bytes, 0, 1.0)
STORED_FORMS: Mapping[str | None, StoredForm] = {
    None: OWN,  # in the format of --mixed_precision, or in that of the file; decoding these is counted with the step
    "bf16": StoredForm(lambda matrix: 2 * matrix.num_values, 0, 1.0),
    "fp8": StoredForm(lambda matrix: matrix.num_values + matrix.itemsize * matrix.rows, 2, 1.05),
    "int8": StoredForm(int8_bytes, 2, 1.05),
    "int8_rotated": StoredForm(int8_bytes, 2, 1.1),
    "nf4": StoredForm(nf4_bytes, 1, 1.15),
    "nf4_double": StoredForm(nf4_double_bytes, 1, 1.15),
}


def multiplied(form: StoredForm) -> StoredForm:
    """A form of 8 bits whose codes are multiplied as they are, which is counted with the step.

    On a card they are there once more for a moment, in the order that it wants for gradients: half a copy in 16 bits.
    """
    return replace(form, num_copies=0.5, slowdown=1.0)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of a model by what can be done with them."""

    fixed_bytes: int  # of what keeps its form and place: embedders, norms, biases
    storable: tuple[Matrix, ...]  # that have another form and stay where they are
    blocks: tuple[tuple[Matrix, ...], ...]  # that can wait in main memory too, by the place of their block

    @classmethod
    def of(cls, model: nn.Module, storable: Iterable[nn.Module], blocks: Sequence[nn.Module]) -> "ModelWeights":
        """`storable` are all layers that may be stored in a form; those in `blocks` may wait."""
        layers = {layer: Matrix.of_layer(layer) for layer in storable}
        by_block = [[layer for layer in block.modules() if layer in layers] for block in blocks]
        inside = {layer for found in by_block for layer in found}
        fixed = bytes_of(model) - sum(matrix.own_bytes for matrix in layers.values())
        return cls(
            fixed,
            tuple(matrix for layer, matrix in layers.items() if layer not in inside),
            tuple(tuple(layers[layer] for layer in found) for found in by_block),
        )

    def block_bytes(self, form: StoredForm) -> list[int]:
        """Bytes of the weights of each block that can wait."""
        return [sum(map(form.num_bytes, block)) for block in self.blocks]

    def resident_bytes(self, form: StoredForm, waiting: Collection[int]) -> int:
        """Bytes on the device with the blocks at some places in main memory, the slots for them included."""
        sizes = self.block_bytes(form)
        staying = sum(size for place, size in enumerate(sizes) if place not in waiting)
        slots = NUM_SLOTS * max((sizes[place] for place in waiting), default=0)
        return self.fixed_bytes + sum(map(form.num_bytes, self.storable)) + staying + slots

    def shared_bytes(self, form: StoredForm, num_processes: int) -> int:
        """Bytes on one device where the weights lie spread over as many.

        Beside the share two blocks are together at a time, and one of them is there twice while it comes.
        """
        sizes = [*self.block_bytes(form), *map(form.num_bytes, self.storable)]
        return self.fixed_bytes + ceil(sum(sizes) / num_processes) + (NUM_SLOTS + 1) * max(sizes, default=0)

    def decoded_bytes(self, form: StoredForm) -> int:
        """The most that decoding one weight takes for a moment."""
        matrices = [*self.storable, *(matrix for block in self.blocks for matrix in block)]
        return round(form.num_copies * max((matrix.plain_bytes for matrix in matrices), default=0))
