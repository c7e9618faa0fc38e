"""Weights that are encoded some rows at a time: rounding takes several copies in float32, which need not be whole."""

from collections.abc import Callable
from math import ceil

from torch import Tensor

from library.memory.codecs.codec import Parts

NUM_VALUES = 2**20  # encoded at a time, about
STEP = 64  # rows are taken in multiples of this many, so that no group of values is cut


def encode_in_chunks(weight: Tensor, encode: Callable[[Tensor], Parts]) -> Parts:
    """What `encode` makes of rows (O, I) of a weight, put together; each part is as long as its rows are many."""
    weight_OI = weight.detach().flatten(1)
    num_rows = len(weight_OI)
    rows = min(num_rows, max(1, NUM_VALUES // weight_OI.shape[1] // STEP) * STEP)
    rows = num_rows if weight.is_meta else rows  # which costs no memory
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for first in range(0, num_rows, rows):
        for name, part in encode(weight_OI[first : first + rows]).items():
            if name not in whole:
                whole[name] = part.new_empty((ceil(len(part) * num_rows / rows), *part.shape[1:]))
            start = filled.get(name, 0)
            filled[name] = start + len(part)
            whole[name][start : filled[name]] = part
    return whole
