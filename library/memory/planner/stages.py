"""Stages before training, in which models encode pictures or captions a few at a time."""

from dataclasses import dataclass

MOST_AT_ONCE = 8  # more is hardly faster


@dataclass(frozen=True)
class Stage:
    """What a stage needs, in bytes of tensors."""

    name: str
    option: str  # that says how many are encoded at a time
    weights: int
    rise_of_one: int  # most above the weights
    rise_of_each_more: int

    def peak(self, count: int) -> int:
        """With as many at a time."""
        return self.weights + self.rise_of_one + (count - 1) * self.rise_of_each_more

    def most_that_fits(self, num_bytes: int) -> int:
        """How many at a time, a power of two up to 8; 0 where not even one fits."""
        count = MOST_AT_ONCE
        while count and self.peak(count) > num_bytes:
            count //= 2
        return count
