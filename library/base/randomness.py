"""Random numbers that depend only on their purpose, never on earlier draws.

Every draw of a run names its purpose and place: `random_for(seed, "crop", epoch, draw)`. Equal arguments yield equal
numbers in any process, with any number of loader workers, and after any resume.
"""

import random
from hashlib import blake2b

import torch


def stream_seed(seed: int, *place: str | int) -> int:
    """Return a 63-bit seed for a place of a run. Equal places have equal seeds, different places unrelated ones."""
    # The types tell 1 from "1". Python's own hash of a string differs between processes.
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in (seed, *place))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def random_for(seed: int, *place: str | int) -> random.Random:
    """Return a Python generator seeded for a place of a run."""
    return random.Random(stream_seed(seed, *place))


def generator_for(seed: int, *place: str | int) -> torch.Generator:
    """Return a torch generator seeded for a place of a run. It is on the CPU: its numbers do not depend on the GPU."""
    return torch.Generator().manual_seed(stream_seed(seed, *place))
