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


@contextmanager
def importing(what: str) -> Iterator[None]:
    """Keep the collector off while modules are imported, and let no later collection look through them."""
    with without_collection():
        yield
        keep_imported(what)


@cache
def keep_imported(what: str) -> None:
    """Let no later collection look through what there is by now; once in a process, so that nothing piles up.

    What is garbage by then, 8 MB after all imports, stays: to look for it takes a third of a second.
    """
    gc.freeze()
