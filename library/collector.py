"""Python's garbage collector, kept away from what stays to the end: looking through it took a fifth of every start."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep the collector off while many objects are made of which none is garbage: pictures, imported modules."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def keep_imported() -> None:
    """Let no later collection look through what was imported; once in a process, so that nothing piles up."""
    gc.collect()
    gc.freeze()
