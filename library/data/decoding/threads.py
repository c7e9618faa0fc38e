"""Many small reads of files: in this thread while the disk answers at once, in many threads where it lets one wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

from library.progress import progress_bar

Item = TypeVar("Item")
Value = TypeVar("Value")

BLOCK = 512
SLOW_READ_S = 0.0002  # waiting for one file; a file in memory takes a tenth of it


def in_blocks(
    function: Callable[[Sequence[Item]], list[Value]], items: Sequence[Item], num_threads: int, title: str | None = None
) -> list[Value]:
    """The function's values for all items, in order; it is given blocks of them. With a title a bar is shown.

    Threads that take turns at one interpreter cost more than they save while files lie in memory, so they are used from
    the first block on in which most of the time was spent waiting.
    """
    values: list[Value] = []
    blocks = (items[start : start + BLOCK] for start in range(0, len(items), BLOCK))
    shown = nullcontext() if title is None else progress_bar(title, len(items), leave=False)
    with shown as bar:
        for found in _found(function, blocks, num_threads):
            values += found
            if bar is not None:
                bar.update(len(found))
    return values


def _found(
    function: Callable[[Sequence[Item]], list[Value]], blocks: Iterator[Sequence[Item]], num_threads: int
) -> Iterator[list[Value]]:
    for block in blocks:
        wall, cpu = time.perf_counter(), time.thread_time()
        yield function(block)
        waited = time.perf_counter() - wall - (time.thread_time() - cpu)
        if num_threads > 1 and waited > SLOW_READ_S * len(block):
            break
    with ThreadPoolExecutor(num_threads) as pool:
        rest = (block[i : i + 16] for block in blocks for i in range(0, len(block), 16))
        yield from pool.map(function, rest)
