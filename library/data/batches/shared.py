"""A batch maker for worker processes that are not forked from this one, as on macOS, Windows and Python 3.14.

A forked worker shares its parent's memory. Other workers receive everything pickled, so a million images would be
copied to each. Therefore the columns are placed in shared memory, and the pickled size does not grow with the images.
"""

import pickle
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.base.errors import UserError, about
from library.data.batches.batches import BatchMaker, BatchOrder, PartialBatch

ALIGNMENT = 64  # bytes; no column has wider values


@dataclass(frozen=True, eq=False)
class SharedMaker(Dataset[PartialBatch | UserError]):
    """A batch maker whose columns are shared with worker processes instead of copied."""

    content: bytes  # pickled, without the columns
    columns: Tensor  # uint8, one after another, in shared memory
    sizes: tuple[int, ...]  # bytes of each column

    @classmethod
    def of(cls, maker: BatchMaker) -> "SharedMaker":
        """Move the columns of a maker into shared memory. Raises UserError if there is no room."""
        buffers: list[pickle.PickleBuffer] = []
        # Protocol 5 hands out the memory of arrays instead of copying it into the pickle.
        content = pickle.dumps(maker, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        sizes = tuple(view.nbytes for view in views)
        columns = torch.empty(sum(map(aligned, sizes)), dtype=torch.uint8)
        try:
            columns.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise about("--max_data_loader_n_workers")(
                f": shared memory has no room for the {len(columns) / 1e6:.0f} MB that describe the images ({error})",
                "enlarge it (docker run --shm-size), or use 0",
            ) from error
        for column, view in zip(split_columns(columns, sizes), views, strict=True):
            column[:] = np.frombuffer(view, dtype=np.uint8)
        return cls(content, columns, sizes)

    @cached_property
    def maker(self) -> BatchMaker:
        """The batch maker, whose arrays are views of the shared columns."""
        maker: BatchMaker = pickle.loads(self.content, buffers=split_columns(self.columns, self.sizes))
        return maker

    def __getitem__(self, order: BatchOrder) -> PartialBatch | UserError:
        return self.maker[order]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def split_columns(columns: Tensor, sizes: tuple[int, ...]) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """Return a view of each column's bytes."""
    values = columns.numpy()
    starts = accumulate(map(aligned, sizes), initial=0)
    # Not strict: `starts` also has the end of the last column.
    return [values[start : start + size] for start, size in zip(starts, sizes, strict=False)]
