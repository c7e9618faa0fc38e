"""Progress of long tasks: a bar for people, and events for a listener."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from tqdm import tqdm

from library.base.launcher import launched_rank

State = Literal["begin", "progress", "end"]
Listener = Callable[[str, State, int, int], None]
"""A callback that gets (title, state, number done, total)."""

LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@dataclass
class Bar:
    """The counter of a progress bar."""

    title: str
    total: int
    tqdm_bar: Any
    listener: Listener | None
    done: int = 0

    def update(self, count: int) -> None:
        """Add `count` to the finished part."""
        self.done += count
        self.tqdm_bar.update(count)
        self.notify("progress")

    def notify(self, state: State) -> None:
        if self.listener is not None:
            self.listener(self.title, state, self.done, self.total)


@contextmanager
def progress_bar(title: str, total: int, leave: bool = True) -> Iterator[Bar]:
    """Show a progress bar on standard error in the main process, and report to the listener set by `listening`."""
    is_main = launched_rank() == 0
    with tqdm(total=total, desc=title, disable=not is_main, leave=leave, smoothing=0, dynamic_ncols=True) as tqdm_bar:
        bar = Bar(title.rstrip("…"), total, tqdm_bar, LISTENER.get() if is_main and total else None)
        bar.notify("begin")
        try:
            yield bar
        finally:
            bar.notify("end")


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report the progress of this thread's tasks to `listener` inside the block."""
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)
