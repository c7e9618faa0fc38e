"""Weight format nf4_double: nf4 with quantised scales (QLoRA's double quantisation)."""

from math import ceil

from library.memory.codecs.weight_format import WeightFormat
from library.memory.formats.nf4 import FACTOR_GROUP, GROUP, PACKAGE, Nf4


def num_bytes(num_rows: int, num_columns: int, itemsize: int) -> int:
    """Return the bytes: half a byte per value, one per 64 values, a float32 per 256 scales and one for their mean."""
    num_values = num_rows * num_columns
    num_factors = ceil(num_values / GROUP)
    return ceil(num_values / 2) + num_factors + 4 * ceil(num_factors / FACTOR_GROUP) + 4


FORMAT = WeightFormat(
    Nf4(is_double=True), num_bytes, num_copies=1, slowdown=1.15, required_package=PACKAGE, error=0.138
)
