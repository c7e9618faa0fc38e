"""Stages before training, in which models encode images or captions a few at a time."""

from dataclasses import dataclass

MOST_AT_ONCE = 8  # larger batches are hardly faster


@dataclass(frozen=True)
class Stage:
    """The memory needs of a stage, in bytes of tensors."""

    name: str
    option: str  # the flag that sets the batch size
    weights: int
    rise_of_one: int  # peak above the weights
    rise_of_each_more: int

    def peak(self, count: int) -> int:
        """Return the peak bytes with this batch size."""
        return self.weights + self.rise_of_one + (count - 1) * self.rise_of_each_more

    def most_that_fits(self, num_bytes: int) -> int:
        """Return the largest batch size that fits, a power of two up to 8; 0 if not even one does."""
        count = MOST_AT_ONCE
        while count and self.peak(count) > num_bytes:
            count //= 2
        return count
