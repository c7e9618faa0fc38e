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
    streamed_weights: int | None = None  # with layers in main memory, where the weights do not fit; None if they stay

    def peak(self, count: int, is_streamed: bool = False) -> int:
        """Return the peak bytes with this batch size."""
        weights = self.streamed_weights if is_streamed and self.streamed_weights is not None else self.weights
        return weights + self.rise_of_one + (count - 1) * self.rise_of_each_more

    def is_streamed(self, count: int, num_bytes: int) -> bool:
        """Return True if this batch size fits only with layers in main memory."""
        return self.peak(count) > num_bytes >= self.peak(count, is_streamed=True)

    def most_that_fits(self, num_bytes: int) -> int:
        """Return the largest batch size that fits, a power of two up to 8; 0 if not even one does."""
        for is_streamed in (False, True):
            count = MOST_AT_ONCE
            while count and self.peak(count, is_streamed) > num_bytes:
                count //= 2
            if count:
                return count
        return 0
