"""Which cases of a parametrised test belong to which tier."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

KNOWN_BASES = frozenset(Path(__file__).with_name("known_bases.txt").read_text(encoding="utf-8").split())
"""Base models that have passed the nightly tests; the others meet these in the slow tier."""


def first_is_fast(cases: Iterable[Any]) -> list[Any]:
    """Return `cases` with all but the first marked as slow, which repeat for other values what the first shows."""
    first, *others = cases
    return [first, *(pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in others)]


def is_of_new_base(values: Mapping[str, object]) -> bool:
    """Return True if the values of a case name a base model that `known_bases.txt` does not list."""
    # Importing the base models takes seconds; a test that has one as a value has imported them.
    bases = getattr(sys.modules.get("tests.tiny.bases"), "BASES", {})
    return any(isinstance(value, str) and value in bases and value not in KNOWN_BASES for value in values.values())
