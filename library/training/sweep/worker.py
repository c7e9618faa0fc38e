"""Functions that import torch, called in a process of their own."""

import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Standing:
    """A run that has ended or paused: its last losses, and its file."""

    label: str
    step: int  # at which the weights of its file were saved
    measured_step: int | None  # of its last validation; None without one
    losses: Mapping[str, float]  # of each held-out image, by the digest of its content
    ended: str  # why it ended before its last step; "" if it did not
    file: str | None  # the file's name; None if no final file was written


@dataclass(frozen=True)
class RunSize:
    """The bytes that a run writes; 0 where a module of others leaves them unknown."""

    adapter: int  # the final file, at least
    state: int


@dataclass(frozen=True)
class Imported:
    """A function of a module that is imported only where the function is called."""

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(self.module), self.name)(*args, **kwargs)


def call_worker(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of a module in a new process and return its result, or raise its error; here if this process has
    imported torch already."""
    if "torch" in sys.modules:
        return function(*args, **kwargs)
    with ProcessPoolExecutor(1, get_context("spawn"), ignore_interrupts) as pool:
        return pool.submit(function, *args, **kwargs).result()


def ignore_interrupts() -> None:
    """Leave the terminal's Ctrl-C to the process that waits for this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
