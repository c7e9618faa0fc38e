"""Random numbers as a function of their purpose, never of what was drawn before.

Every draw of a run names its purpose and place: `random_for(seed, "crop", epoch, draw)`. Equal arguments give equal
numbers in any process, with any number of loader workers, and after any resume.
"""

import random
from hashlib import blake2b

import torch


def stream_seed(seed: int, *place: str | int) -> int:
    """Return a 63-bit seed for one place of a run: equal places give equal seeds, other places unrelated ones."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in (seed, *place))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_for(seed: int, *place: str | int) -> random.Random:
    """Return Python's generator for one place of a run."""
    return random.Random(stream_seed(seed, *place))


def generator_for(seed: int, *place: str | int) -> torch.Generator:
    """Return a torch CPU generator for one place of a run; its numbers do not depend on the GPU."""
    return torch.Generator().manual_seed(stream_seed(seed, *place))
