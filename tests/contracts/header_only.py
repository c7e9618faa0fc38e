"""Full-size base models whose files hold nothing but headers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.tiny.bases import BASES


@dataclass(frozen=True)
class FullSize:
    """A full-size base model whose files hold nothing but headers."""

    script: str
    module: str  # its network module
    side: int  # of its usual images, in pixels
    build: Callable[[Path], list[str]]  # writes it into a folder and returns the arguments that select it


FULL_SIZE: Mapping[str, FullSize] = {
    title: FullSize(base.script, base.module, side, build)
    for base in BASES.values()
    for title, (side, build) in base.full_size.items()
}
