"""Heartbeats between the processes of a run, sent and watched by a thread of each process.

Torch notices a lost process only when its connection breaks within a collective, and on GPUs only after many minutes.
Here every process sends a beat every few seconds. The main process watches all others; each other process watches the
main one and those on its own machine. A loss is logged in one sentence. A process that keeps waiting for the lost one
is then terminated.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

# torchrun and accelerate launch also end and restart the processes of a machine. But they cannot tell the processes
# that save the run which process was lost, and runs across machines or started by mpirun or srun do not have them.
# Those have only torch's timeouts of collectives, which would also hit a process that waits for hours of caching.

logger = logging.getLogger(__name__)

KILLED = "was killed without an error message, for example by the system when main memory ran out"
UNREACHABLE = "the main process or its machine is no longer reachable"


class Store(Protocol):
    """The key-value store through which processes find each other; torch.distributed.Store implements it."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Times:
    """Intervals and timeouts, in seconds."""

    beat: float = 2.0  # between two checks
    silent: float = 60.0  # until a silent process on another machine counts as lost
    say: float = 3.0  # until a loss is logged, unless the process has noticed it itself
    end: float = 60.0  # until the process is terminated, unless it has ended by itself


@dataclass
class Heartbeat:
    """A thread that sends this process's heartbeat and watches the heartbeats of the others."""

    store: Store  # a separate connection: a process that waits for a value blocks the connection it uses
    rank: int
    count: int
    times: Times = field(default_factory=Times)
    lost: str | None = None  # a sentence about the first lost process
    is_stopping: bool = False  # the loss has been noticed and this process is ending
    # sys.exit would end the thread of the heartbeat alone, while the main thread may wait in a collective for ever.
    quit: Callable[[int], object] = os._exit
    _is_over: threading.Event = field(default_factory=threading.Event)
    _hosts: dict[int, str] = field(default_factory=dict)  # host and process ID by rank
    _last_beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # last beat and its time by rank

    def start(self) -> None:
        """Start the watching thread. Must be called after all processes have joined."""
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Deregister: peers stop expecting this process, and it stops watching them."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._set(f"over/{self.rank}", "1")

    def find(self) -> str | None:
        """Return a sentence about a lost process, or None if none is known."""
        try:
            for rank in self._watched_ranks:
                if (description := self._describe_loss(rank)) is not None:
                    return description
            return self.store.get("lost").decode() if self.store.check(["lost"]) else None
        except RuntimeError:
            return UNREACHABLE

    @property
    def _watched_ranks(self) -> Sequence[int]:
        peers = [rank for rank in range(self.count) if rank != self.rank]
        if self.rank == 0:
            return peers
        return [rank for rank in peers if rank == 0 or self._find_host(rank).rpartition(" ")[0] == socket.gethostname()]

    def _find_host(self, rank: int) -> str:
        if rank not in self._hosts:
            self._hosts[rank] = self.store.get(f"process/{rank}").decode()
        return self._hosts[rank]

    def _describe_loss(self, rank: int) -> str | None:
        process = self._find_host(rank)
        host = process.rpartition(" ")[0]
        # Checked before the keys: a process that ends between the two checks has set its keys by then.
        has_vanished = has_ended(process)
        if self.store.check([f"failure/{rank}"]):
            return f"process {rank} ended with an error: {self.store.get(f'failure/{rank}').decode()}"
        if self.store.check([f"over/{rank}"]):
            return None
        if has_vanished:
            return f"process {rank} {KILLED}"
        if host == socket.gethostname() or not self.store.check([f"beat/{rank}"]):
            return None
        beat, now = self.store.get(f"beat/{rank}"), time.monotonic()
        previous, since = self._last_beats.get(rank, (b"", now))
        self._last_beats[rank] = (beat, now if beat != previous else since)
        if now - self._last_beats[rank][1] > self.times.silent:
            return (
                f"process {rank} on {host} has sent nothing for {now - since:.0f} s: its machine or the network is down"
            )
        return None

    def _set(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except RuntimeError:  # the process that hosted the store has ended
            logger.debug("the store is unreachable", exc_info=True)

    def _watch(self) -> None:
        num_beats = 0
        while not self._is_over.wait(self.times.beat):
            # A counter instead of a time, since the clocks of machines differ.
            self._set(f"beat/{self.rank}", str(num_beats := num_beats + 1))
            description = self.find()
            if description is not None and not self._is_over.is_set():
                self.lost = description
                break
        if self.lost is None:
            return
        if self.rank == 0:
            self._set("lost", self.lost)
        if self._is_over.wait(self.times.say) or self.is_stopping:
            return
        logger.error("%s; this process will end too, within %.0f s", self.lost, self.times.end)
        if self._is_over.wait(self.times.end) or self.is_stopping:
            return
        # os._exit runs no exit handlers, so the log is flushed here.
        logging.shutdown()
        self.quit(1)


def has_ended(process: str) -> bool:
    """Return True if a process, given as "host pid", is known to have ended; always False for another machine."""
    host, _, pid = process.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        # psutil instead of os.kill(pid, 0), which is Ctrl+C on Windows.
        return bool(psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
