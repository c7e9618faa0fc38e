"""Complete denoisers with enough blocks for swapping, to test the ring, weight formats and block runners."""

from collections.abc import Mapping

from tests.tiny.base import Deep
from tests.tiny.bases import BASES

DEEP: Mapping[str, Deep] = {name: base.deep for name, base in BASES.items() if base.deep is not None}
