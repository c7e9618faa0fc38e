"""Weight format bf16: two bytes per value, whatever --mixed_precision is."""

import torch

from library.memory.codecs.plain import Plain
from library.memory.codecs.weight_format import WeightFormat


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    return 2 * num_rows * num_columns


FORMAT = WeightFormat(Plain(torch.bfloat16), num_bytes, num_copies=0, slowdown=1.0, error=0.0017)
