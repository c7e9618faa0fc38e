"""Keeps libraries out of runs that do not use them.

diffusers, transformers and peft import them just because they are installed: bitsandbytes for quantised models, which
are not loaded here (where it was built for another CUDA that ended runs that never use it; everywhere it takes a
second), scipy for object detection and for noise schedules that are not used here: half a second of every start.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES = "bitsandbytes"


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Let libraries that look for `name` in the block find none, unless it is loaded or diffusers has found it already.

    `show` ends this early. What a library found out in the block it remembers.
    """
    if name not in sys.modules and not is_found_by_diffusers(name):
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        show(name)


def show(name: str) -> None:
    """Let it be found again: an optimizer may need bitsandbytes."""
    if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def is_found_by_diffusers(name: str) -> bool:
    """Return True if diffusers is loaded and found a library then: its later imports fail where that one is hidden."""
    module = sys.modules.get("diffusers.utils.import_utils")
    return module is not None and bool(getattr(module, f"is_{name}_available", bool)())


def find_neither() -> None:
    """Let diffusers and transformers find that neither library is there, which they remember.

    Whoever looks later finds both.
    """
    with hidden(BITSANDBYTES), hidden("scipy"):
        import diffusers.utils.import_utils  # noqa: F401  # looks while it is imported
        from transformers.utils import is_scipy_available

        is_scipy_available()
