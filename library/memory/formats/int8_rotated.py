"""Weight format int8_rotated: int8 after a rotation that spreads outliers."""

from library.memory.codecs.weight_format import WeightFormat
from library.memory.formats.int8 import Int8Rows, num_bytes

FORMAT = WeightFormat(
    Int8Rows(is_rotated=True), num_bytes, num_copies=2, slowdown=1.1, supports_8bit_matmul=True, error=0.0086
)
