"""Stages before training, in which models encode images or captions in small batches."""

from dataclasses import dataclass

from library.memory.planner.prediction import ALLOCATOR_SHARE
from library.memory.planner.speed import NO_WORK, Work

MOST_AT_ONCE = 8  # larger batches are hardly faster

# An image of 1024 x 1024 keeps a GPU busy by itself: the VAE's first and last layers have 128 channels at full size,
# 134 million values. [derived]
PIXELS_AT_ONCE = 1024 * 1024


@dataclass(frozen=True)
class StageMemory:
    """Memory needs of a stage, in bytes."""

    name: str
    option: str  # flag that sets the batch size
    weights: int
    rise_of_one: int  # peak above the weights, for one item
    rise_of_each_more: int
    streamed_weights: int | None = None  # on the device, with layers in main memory; None if not possible
    most: int = MOST_AT_ONCE  # largest useful batch size, a power of two
    work: Work = NO_WORK  # for one item

    def peak(self, count: int, is_streamed: bool = False) -> int:
        """Return the peak bytes with this batch size, including the overhead of the allocator."""
        weights = self.streamed_weights if is_streamed and self.streamed_weights is not None else self.weights
        rise = self.rise_of_one + (count - 1) * self.rise_of_each_more
        return weights + round((1 + ALLOCATOR_SHARE) * rise)

    def is_streamed(self, count: int, num_bytes: int) -> bool:
        """Return True if this batch size fits only with layers streamed from main memory."""
        return self.peak(count) > num_bytes >= self.peak(count, is_streamed=True)

    def most_that_fits(self, num_bytes: int) -> int:
        """Return the largest batch size that fits, a power of two up to `most`, or 0 if none does."""
        for is_streamed in (False, True):
            count = self.most
            while count and self.peak(count, is_streamed) > num_bytes:
                count //= 2
            if count:
                return count
        return 0


def max_images(num_pixels: int) -> int:
    """Return how many images of this size to encode at once: a power of two up to 8, about one megapixel in total."""
    count = MOST_AT_ONCE
    while count > 1 and count * num_pixels > PIXELS_AT_ONCE:
        count //= 2
    return count
