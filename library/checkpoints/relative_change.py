"""The size of an adapter's change relative to the base model's weights.

It is |W' - W| / |W|: Frobenius norms over all adapted weights, at strength 1.
"""

import math
from collections.abc import Iterable

# Measured on the toy base model (benchmarks/RESULTS.md): below the first, images differ by less than 3 of 255 values;
# below the second, at most 3 % of the images of a LoRA show what it was trained on.
INVISIBLE, CLEAR = 0.002, 0.03


def relative_norm(norms: Iterable[tuple[float, float]]) -> float | None:
    """Return |W' - W| / |W| over several weights from the two norms of each; None without a weight."""
    pairs = list(norms)
    whole = math.hypot(*(base for _, base in pairs))
    return math.hypot(*(change for change, _ in pairs)) / whole if whole else None


def format_change(ratio: float) -> str:
    """Return the size of a change and what it means, as a phrase."""
    return f"it changes the adapted weights by {ratio:.2%}: {judge_change(ratio)}"


def judge_change(ratio: float) -> str:
    """Return what a change of this size does to images, as a phrase."""
    if ratio < INVISIBLE:
        return "too little to see; docs/faults.md says what to change"
    return "little, which may not show yet what was trained" if ratio < CLEAR else "enough to see"
