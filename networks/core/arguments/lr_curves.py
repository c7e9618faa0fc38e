"""Learning rate factors by block: `down_lr_weight`, `mid_lr_weight` and `up_lr_weight`, as numbers or as a curve."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.options.kinds import Kind, parse_text
from networks.core.arguments.values import NUMBER, NUMBERS

LR_CURVES: Mapping[str, Callable[[float], float]] = {  # factor by the relative position of a block in its side, 0 to 1
    "cosine": lambda t: math.sin(math.pi / 2 * (1 - t)),
    "sine": lambda t: math.sin(math.pi / 2 * t),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


@dataclass(frozen=True)
class LrPreset:
    """Named curve of learning rate factors over the blocks of one side, plus `offset`."""

    name: str
    offset: float = 0.0


LrWeights = tuple[float, ...] | LrPreset


def parse_lr_weights(text: str) -> LrWeights:
    """Parse comma-separated learning rate factors, or a curve such as `cosine` or `sine+0.25`."""
    name, plus, offset = text.replace(" ", "").partition("+")
    if name in LR_CURVES:
        return LrPreset(name, parse_text(offset, NUMBER) if plus else 0.0)
    try:
        weights: tuple[float, ...] = parse_text(text, NUMBERS)
    except ValueError:
        raise ValueError(text) from None
    return weights


LR_WEIGHTS = Kind(f"numbers with commas between them, or one of {', '.join(LR_CURVES)}", parse=parse_lr_weights)
