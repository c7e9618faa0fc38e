"""Weight format int8: 8-bit integers with a scale for each row."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from library.memory.codecs.chunks import encode_in_chunks
from library.memory.codecs.codec import Parts
from library.memory.codecs.matmul_8bit import Codes
from library.memory.codecs.weight_format import WeightFormat

LARGEST = 127  # symmetric range, so that zero stays zero
MOST_ROTATED = 256  # inputs per rotation; larger groups hardly spread outliers further and cost more to undo


@dataclass(frozen=True)
class Int8Rows:
    """Storage in two parts: `codes` (O, I), and `scales` (O, 1) in float32. Errors are at most half a row's scale.

    With `is_rotated`, groups of inputs are rotated by a Hadamard matrix before rounding, and rotated back on decoding
    (QuaRot, arXiv:2404.00456). This spreads a single outlier, which would inflate the scale of its row, over its group.
    """

    is_rotated: bool = False

    def encode(self, weight: Tensor) -> Parts:
        return encode_in_chunks(weight, self.encode_rows)

    def encode_rows(self, weight_OI: Tensor) -> Parts:
        values_OI = rotate(weight_OI.float()) if self.is_rotated else weight_OI.float()
        largest_O1 = values_OI.abs().amax(dim=1, keepdim=True)
        # A row of zeros would divide 0 by 0.
        scales_O1 = torch.where(largest_O1 > 0, largest_O1 / LARGEST, 1.0)
        return {"codes": (values_OI / scales_O1).round().to(torch.int8), "scales": scales_O1}

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # On GPUs this is one kernel, which reads the codes and writes the weight. A cast before it would write and read
        # the weight once more. CPUs make a copy either way.
        weight_OI = torch.mul(parts["codes"], parts["scales"].to(dtype))
        return (rotate(weight_OI) if self.is_rotated else weight_OI).reshape(shape)

    def codes(self, parts: Parts) -> Codes:
        return Codes(parts["codes"], parts["scales"], rotate if self.is_rotated else None)


def rotate(weight_OI: Tensor) -> Tensor:
    """Multiply each group of inputs by a Hadamard matrix, which is its own inverse."""
    size = group_size(weight_OI.shape[1])
    rotated: Tensor = weight_OI.reshape(-1, size) @ hadamard(size, weight_OI.dtype, weight_OI.device)
    return rotated.reshape(weight_OI.shape)


def group_size(num_inputs: int) -> int:
    """Return the largest power of two up to 256 that divides the number of inputs; 1 disables the rotation."""
    return min(num_inputs & -num_inputs, MOST_ROTATED)


@contextmanager
def clear_hadamard_cache() -> Iterator[None]:
    """Clear the matrix cache after the block, because tensors made inside it may be fake."""
    try:
        yield
    finally:
        hadamard.cache_clear()


@cache
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the symmetric orthogonal matrix (size, size) of Sylvester's construction; `size` is a power of two."""
    # In float64, 1 / sqrt(size) is rounded only once, to `dtype`.
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    orthogonal: Tensor = matrix / size**0.5
    return orthogonal.to(device, dtype)


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    """Return the bytes of a matrix: one per value, and a float32 per row."""
    return num_rows * num_columns + 4 * num_rows


FORMAT = WeightFormat(Int8Rows(), num_bytes, num_copies=2, slowdown=1.05, supports_8bit_matmul=True, error=0.0721)
