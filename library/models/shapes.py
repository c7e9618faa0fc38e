"""Model configurations from the shapes of weights, so that tiny and pruned models load from a single file.

`shapes` maps the module paths of diffusers and transformers to shapes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from library.base.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

NORM_GROUPS = 32


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """Look up a shape. Raises UserError if the name is missing."""
    if name not in shapes:
        raise UserError(f"{name} is missing; the checkpoint is incomplete or of another kind")
    return shapes[name]


def count(shapes: Shapes, pattern: str) -> int:
    """Count the distinct numbers in the one group of `pattern`, which is matched at the beginning of each name."""
    return len({match[1] for match in (re.match(pattern, name) for name in shapes) if match})


@dataclass(frozen=True)
class ShapeReader:
    """Reader of the sizes of one of our denoisers from a checkpoint, names without prefix; errors name the model."""

    model: str  # its name in messages
    shapes: Shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Look up a shape. Raises UserError if the name is missing."""
        if name not in self.shapes:
            raise UserError(f"{name} is missing", f"use a complete {self.model} checkpoint")
        return self.shapes[name]

    def count(self, stem: str) -> int:
        """Count the blocks `<stem>.0`, `<stem>.1`, …. Raises UserError if there are none, or if a number is missing."""
        numbers = {int(match[1]) for name in self.shapes if (match := re.match(rf"{re.escape(stem)}\.(\d+)\.", name))}
        if not numbers or numbers != set(range(len(numbers))):
            raise UserError(
                f"its {stem} are numbered {sorted(numbers)}, not 0, 1, 2, ...",
                f"use a complete {self.model} checkpoint",
            )
        return len(numbers)


def norm_groups(*channels: int) -> int:
    """Return 32, or for narrow models the largest divisor of 32 that divides every width."""
    return gcd(NORM_GROUPS, *channels)


def choose_num_heads(width: int, wanted: int) -> int:
    """Return `wanted`, or the largest smaller number of heads that divides `width`."""
    return next(heads for heads in range(max(wanted, 1), 0, -1) if width % heads == 0)
