"""Weight formats, the values of --base_format. Each is one file in library/memory/formats that defines FORMAT."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from library.memory.codecs.codec import Codec


@dataclass(frozen=True)
class WeightFormat:
    """A codec for frozen weights and the costs that the planner needs."""

    codec: Codec
    num_bytes: Callable[[int, int, int], int]  # from rows, columns and bytes per decoded value of a matrix
    num_copies: float  # decoded copies that exist at once during decoding; 0 if the stored tensor is used itself
    slowdown: float  # factor on the arithmetic due to decoding [derived, benchmarks/RESULTS.md; not measured on a GPU]
    supports_8bit_matmul: bool = False  # `codes` can be multiplied without decoding (--base_arithmetic 8bit)
    required_package: str | None = None
    error: float | None = (
        None  # relative, of a layer's output with outliers among its weights (benchmarks/format_errors.py)
    )


def load_format(name: str) -> WeightFormat:
    """Import the format named by --base_format. Optional packages are imported only when a format uses them."""
    weight_format: WeightFormat = importlib.import_module(f"library.memory.formats.{name}").FORMAT
    return weight_format
