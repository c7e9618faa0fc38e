"""Keeps bitsandbytes out of runs that do not use it.

diffusers and peft import it just because it is installed, for quantized models, which are not loaded here. Where it was
built for another CUDA that ended runs that never use it; everywhere it takes a second.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "bitsandbytes"


@contextmanager
def hidden_bitsandbytes() -> Iterator[None]:
    """Let libraries that look for bitsandbytes in the block find none, unless it is loaded already.

    `show_bitsandbytes` ends this early. What a library found out in the block it remembers.
    """
    if NAME not in sys.modules:
        sys.modules[NAME] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        show_bitsandbytes()


def show_bitsandbytes() -> None:
    """Let it be found again: an optimizer may need it."""
    if NAME in sys.modules and sys.modules[NAME] is None:
        del sys.modules[NAME]
