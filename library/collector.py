"""Control of Python's garbage collector, whose scans of long-lived objects took a fifth of every start."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable the collector while many objects are made of which none is garbage, such as images and imported
    modules."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def freeze_imports(what: str) -> Iterator[None]:
    """Disable the collector during imports and exempt the imported objects from later collections."""
    with pause_collection():
        yield
        keep_imported(what)


@cache
def keep_imported(what: str) -> None:
    """Exempt all existing objects from later collections; once per process and `what`, so that nothing piles up."""
    # Garbage of that moment, 8 MB after all imports, is kept: finding it would take a third of a second.
    gc.freeze()
