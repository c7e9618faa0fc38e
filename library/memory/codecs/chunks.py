"""Encoding of weights a few rows at a time, since rounding needs several float32 copies of what it encodes."""

from collections.abc import Callable
from math import ceil

from torch import Tensor

from library.memory.codecs.codec import Parts

NUM_VALUES = 2**20  # encoded at a time, approximately
STEP = 64  # rows per chunk are a multiple of this, so that no quantisation group is split


def encode_in_chunks(weight: Tensor, encode: Callable[[Tensor], Parts]) -> Parts:
    """Encode the rows (O, I) of a weight in chunks and join the parts. Part lengths must be proportional to rows."""
    weight_OI = weight.detach().flatten(1)
    num_rows = len(weight_OI)
    rows = min(num_rows, max(1, NUM_VALUES // weight_OI.shape[1] // STEP) * STEP)
    rows = num_rows if weight.is_meta else rows  # meta tensors cost no memory
    joined: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for first in range(0, num_rows, rows):
        for name, part in encode(weight_OI[first : first + rows]).items():
            if name not in joined:
                # The first chunk is a whole one, so its parts tell how long the joined parts are.
                joined[name] = part.new_empty((ceil(len(part) * num_rows / rows), *part.shape[1:]))
            start = filled.get(name, 0)
            filled[name] = start + len(part)
            joined[name][start : filled[name]] = part
    return joined
