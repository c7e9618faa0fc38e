"""Control of Python's garbage collector. Its scans of long-lived objects took a fifth of every start."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable the collector inside the block, for code that creates many objects that stay alive: images, imported
    modules."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def freeze_imports(name: str) -> Iterator[None]:
    """Disable the collector during imports and exempt the imported objects from later collections."""
    with pause_collection():
        yield
        keep_imported(name)


@cache
def keep_imported(name: str) -> None:
    """Exempt all existing objects from later collections, at most once per process and `name`."""
    # Skip gc.collect() before freezing: finding the 8 MB of garbage that exists after all imports takes a third of a
    # second.
    gc.freeze()


@atexit.register
def release_kept() -> None:
    """Let Python delete the exempted objects at exit if Triton, which CUDA builds of torch import, is among them."""
    # Triton reports its objects that Python does not delete as leaked, in 40 lines below the run's last one. Deleting
    # everything takes a second.
    if "triton" in sys.modules:
        gc.unfreeze()
