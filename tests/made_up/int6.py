"""The made-up weight format int6: 6-bit integers with one scale per row, four packed into three bytes."""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from library.memory.codecs.chunks import encode_in_chunks
from library.memory.codecs.codec import Parts
from library.memory.codecs.weight_format import WeightFormat

LARGEST, OFFSET = 31, 32


class Int6Rows:
    """Two parts: `packed` (O, 3 * I / 4) bytes, and `scales` (O, 1) in float32."""

    def encode(self, weight: Tensor) -> Parts:
        return encode_in_chunks(weight, encode_rows)

    def decode(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        first, second, third = parts["packed"].int().unflatten(1, (-1, 3)).unbind(-1)
        codes = [first >> 2, (first & 3) << 4 | second >> 4, (second & 15) << 2 | third >> 6, third & 63]
        codes_OI = torch.stack(codes, dim=-1).flatten(1)[:, : shape[1:].numel()] - OFFSET
        return (codes_OI.to(dtype) * parts["scales"].to(dtype)).reshape(shape)

    def codes(self, parts: Parts) -> None:
        return None


def encode_rows(weight_OI: Tensor) -> Parts:
    values_OI = weight_OI.float()
    largest_O1 = values_OI.abs().amax(dim=1, keepdim=True)
    scales_O1 = torch.where(largest_O1 > 0, largest_O1 / LARGEST, 1.0)
    codes_OI = (values_OI / scales_O1).round().int() + OFFSET
    a, b, c, d = pad(codes_OI, (0, -codes_OI.shape[1] % 4)).unflatten(1, (-1, 4)).unbind(-1)
    packed = torch.stack([a << 2 | b >> 4, (b & 15) << 4 | c >> 2, (c & 3) << 6 | d], dim=-1)
    return {"packed": packed.flatten(1).to(torch.uint8), "scales": scales_O1}


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    return num_rows * (3 * ceil(num_columns / 4) + 4)


FORMAT = WeightFormat(Int6Rows(), num_bytes, num_copies=4, slowdown=1.3)
