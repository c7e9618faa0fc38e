"""Weight format fp8: 8-bit floating point with a scale for each row."""

import torch
from torch import Tensor

from library.memory.codecs.chunks import encode_in_chunks
from library.memory.codecs.codec import Parts
from library.memory.codecs.matmul_8bit import FP8, Codes
from library.memory.codecs.weight_format import WeightFormat

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = -24  # smallest exponent of a scale: float16 has no smaller power of two


class Fp8Rows:
    """Storage in two parts: 8-bit `codes` (O, I), and `scales` (O, 1) in the weight's dtype.

    A scale is the power of two that brings its row's largest value just below the largest fp8 number. Multiplication by
    it is exact, so the error of a value is at most 1/16 of the value, or 2^-17 of the row's largest.
    """

    def encode(self, weight: Tensor) -> Parts:
        return encode_in_chunks(weight, encode_rows)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts["codes"].to(dtype).mul_(parts["scales"].to(dtype)).reshape(shape)

    def codes(self, parts: Parts) -> Codes:
        return Codes(parts["codes"], parts["scales"])


def encode_rows(weight_OI: Tensor) -> Parts:
    values_OI = weight_OI.float()
    largest_O1 = values_OI.abs().amax(dim=1, keepdim=True)
    scales_O1 = torch.exp2((largest_O1 / LARGEST).log2().ceil().clamp(min=SMALLEST))
    return {"codes": (values_OI / scales_O1).to(FP8), "scales": scales_O1.to(weight_OI.dtype)}


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    """Return the bytes of a matrix: one per value, and a scale per row in the weight's dtype."""
    return num_rows * num_columns + itemsize * num_rows


FORMAT = WeightFormat(Fp8Rows(), num_bytes, num_copies=1, slowdown=1.05, supports_8bit_matmul=True, error=0.0267)
