"""Which cases of a parametrised test belong to the fast tier."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_is_fast(cases: Iterable[Any]) -> list[Any]:
    """Return `cases` with all but the first marked as slow, which repeat for other values what the first shows."""
    first, *others = cases
    return [first, *(pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in others)]
