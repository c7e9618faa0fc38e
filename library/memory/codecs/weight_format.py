"""A value of --base_format: each is one file in library/memory/formats, of the same name, that defines FORMAT."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from library.memory.codecs.codec import Codec


@dataclass(frozen=True)
class WeightFormat:
    """How frozen weights are stored, and what the planner has to know about it."""

    codec: Codec
    num_bytes: Callable[[int, int, int], int]  # of a matrix, from its rows, columns and bytes per unstored value
    num_copies: float  # of a decoded weight at once while it is decoded; none where it is used as it is stored
    slowdown: float  # of the arithmetic, by decoding [derived, see docs/memory.md; no card has confirmed it]
    supports_8bit_matmul: bool = False  # the codec's `codes` can be multiplied as they are (--base_arithmetic 8bit)
    required_package: str | None = None


def load_format(name: str) -> WeightFormat:
    """Import the format that --base_format calls `name`; its optional packages are imported when it is used."""
    found: WeightFormat = importlib.import_module(f"library.memory.formats.{name}").FORMAT
    return found
