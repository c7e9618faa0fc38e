"""Hiding of installed libraries from runs that do not use them.

diffusers, transformers and peft import these just because they are installed: bitsandbytes for quantised models, which
are not loaded here (built for another CUDA it crashed runs that never use it; otherwise it costs a second), and scipy
for object detection and noise schedules that are not used here: half a second of every start.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES = "bitsandbytes"


@contextmanager
def hide_library(name: str) -> Iterator[None]:
    """Make libraries that look for `name` in the block find nothing, unless it is loaded or diffusers has found it
    already.

    `show` ends this early. Libraries remember what they found in the block.
    """
    if name not in sys.modules and not is_found_by_diffusers(name):
        sys.modules[name] = None  # type: ignore[assignment]  # makes Python's import fail
    try:
        yield
    finally:
        show(name)


def show(name: str) -> None:
    """Make a hidden library importable again: an optimizer may need bitsandbytes."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def is_found_by_diffusers(name: str) -> bool:
    """Return True if diffusers has already found a library: its later imports fail if that library is hidden then."""
    module = sys.modules.get("diffusers.utils.import_utils")
    return module is not None and bool(getattr(module, f"is_{name}_available", bool)())


def find_neither() -> None:
    """Import diffusers and transformers while neither library can be found, which they remember; later imports find
    both."""
    with hide_library(BITSANDBYTES), hide_library("scipy"):
        import diffusers.utils.import_utils  # noqa: F401  # looks while it is imported
        from transformers.utils import is_scipy_available

        is_scipy_available()
