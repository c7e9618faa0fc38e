"""Hiding of installed libraries from runs that do not use them.

diffusers, transformers and peft import optional libraries merely because they are installed. bitsandbytes serves
quantised models, which are not loaded here; its import takes a second, and a build for another CUDA version crashed
runs that never use it. scipy serves object detection and noise schedules that are not used here, and takes half a
second of every start.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES = "bitsandbytes"
_hidden: set[str] = set()  # by this module: what another program hides stays hidden


@contextmanager
def hide_library(name: str) -> Iterator[None]:
    """Hide the library `name` from code that checks for it inside the block.

    Has no effect if the library is already imported or diffusers has already found it. `unhide_library` ends the hiding
    early. Libraries remember the result of their check.
    """
    if name not in sys.modules and not is_found_by_diffusers(name):
        sys.modules[name] = None  # type: ignore[assignment]  # makes Python's import fail
        _hidden.add(name)
    try:
        yield
    finally:
        unhide_library(name)


def unhide_library(name: str) -> None:
    """Make a hidden library importable again, for example for an optimizer that needs bitsandbytes."""
    if name in _hidden and sys.modules.get(name, ...) is None:
        del sys.modules[name]
    _hidden.discard(name)


def is_found_by_diffusers(name: str) -> bool:
    """Return True if diffusers has already found a library: its later imports would fail if it were hidden then."""
    module = sys.modules.get("diffusers.utils.import_utils")
    return module is not None and bool(getattr(module, f"is_{name}_available", bool)())


def import_diffusers_hiding_libraries() -> None:
    """Import diffusers and transformers with bitsandbytes and scipy hidden, so that they record both as missing.
    Later imports by other code find both."""
    with hide_library(BITSANDBYTES), hide_library("scipy"):
        import diffusers.utils.import_utils  # noqa: F401  # looks while it is imported
        from transformers.utils import is_scipy_available

        # transformers checks when it is first asked and keeps the answer.
        is_scipy_available()
