"""Reading of many small files, by this thread while the disk responds at once, by several threads if it is slow."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

from library.base.progress import progress_bar

Item = TypeVar("Item")
Value = TypeVar("Value")

BLOCK = 512
SLOW_READ_S = 0.0002  # average wait per file; a cached file takes a tenth of it


def read_many(
    function: Callable[[Item], Value], items: Sequence[Item], num_threads: int, title: str | None = None
) -> list[Value]:
    """Return the function's values for all items, in order. With a title, a progress bar is shown."""
    # While files come from memory, threads cost more by competing for the interpreter than they save. So they are used
    # only after a block in which reads had to wait.
    values: list[Value] = []
    blocks = (items[start : start + BLOCK] for start in range(0, len(items), BLOCK))
    bar_context = nullcontext() if title is None else progress_bar(title, len(items), leave=False)
    with bar_context as bar:
        for block_values in _read_blocks(function, blocks, num_threads):
            values += block_values
            if bar is not None:
                bar.update(len(block_values))
    return values


def _read_blocks(
    function: Callable[[Item], Value], blocks: Iterator[Sequence[Item]], num_threads: int
) -> Iterator[list[Value]]:
    def read(block: Sequence[Item]) -> list[Value]:
        return [function(item) for item in block]

    for block in blocks:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield read(block)
        # Wall time minus CPU time is the time this thread waited for the disk, or for other threads.
        waited = time.perf_counter() - wall - (time.thread_time() - cpu)
        if num_threads > 1 and waited > SLOW_READ_S * len(block):
            break
    # `blocks` is an iterator: the pool gets the blocks that are left.
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        chunks = (block[i : i + 16] for block in blocks for i in range(0, len(block), 16))
        yield from pool.map(read, chunks)
