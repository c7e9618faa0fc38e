"""Whether the other processes of a run still live, looked at by a thread of each process.

Torch tells of a process that is gone only where its connection breaks within an exchange, and on cards only after many
minutes. Here every process says twice in a while that it lives, the main process looks after all, and the others
after the main one and those of their own machine. What is found is said in a sentence; a process that then does not
end by itself, because it waits for the one that is gone, is ended.
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

# torchrun and accelerate launch end and restart the processes of a machine by themselves. They cannot say which process
# is gone to those that save the run, and mpirun, srun and other machines do without them: there, torch's own limits are
# those of a collective, which a process that waits for hours of caching must not have.

logger = logging.getLogger(__name__)

KILLED = "is gone without a word: something killed it, such as the system where main memory was full"
UNREACHABLE = "the main process, or its machine, cannot be reached any more"


class Store(Protocol):
    """The key-value store through which processes find each other; torch.distributed.Store is one."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Times:
    """How long what may take, in seconds."""

    beat: float = 2.0  # between two looks
    silent: float = 60.0  # until a process on another machine counts as gone
    say: float = 3.0  # until it is said, where the process has not noticed it by itself
    end: float = 60.0  # until the process is ended, where it has not ended by itself


@dataclass
class Heartbeat:
    """Says that this process lives, and finds out which other does not."""

    store: Store  # with a connection of its own: a process that waits for a value holds its connection
    rank: int
    count: int
    times: Times = field(default_factory=Times)
    lost: str | None = None  # what has become of another process, in a sentence
    is_told: bool = False  # whether this process ends because of it
    quit: Callable[[int], object] = os._exit
    _is_over: threading.Event = field(default_factory=threading.Event)
    _hosts: dict[int, str] = field(default_factory=dict)  # of each process host and number
    _heard: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # its last word, and when it came

    def start(self) -> None:
        """Begin to look after the others, once all are there."""
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """This process is done: none is to miss it, and it misses none."""
        if not self._is_over.is_set():
            self._is_over.set()
            try:
                self.store.set(f"over/{self.rank}", "1")
            except RuntimeError:  # the store is gone with the process that had it
                logger.debug("the store is gone", exc_info=True)

    def find(self) -> str | None:
        """What has become of a process that is gone, in a sentence; None where none is known to be."""
        try:
            for rank in self._looked_after:
                if (found := self._fate_of(rank)) is not None:
                    return found
            return self.store.get("lost").decode() if self.store.check(["lost"]) else None
        except RuntimeError:
            return UNREACHABLE

    @property
    def _looked_after(self) -> Sequence[int]:
        others = [rank for rank in range(self.count) if rank != self.rank]
        if self.rank == 0:
            return others
        return [rank for rank in others if rank == 0 or self._host_of(rank).rpartition(" ")[0] == socket.gethostname()]

    def _host_of(self, rank: int) -> str:
        if rank not in self._hosts:
            self._hosts[rank] = self.store.get(f"process/{rank}").decode()
        return self._hosts[rank]

    def _fate_of(self, rank: int) -> str | None:
        process = self._host_of(rank)
        host = process.rpartition(" ")[0]
        has_vanished = has_ended(process)
        if self.store.check([f"failure/{rank}"]):
            return f"process {rank} ended with an error: {self.store.get(f'failure/{rank}').decode()}"
        if self.store.check([f"over/{rank}"]):
            return None
        if has_vanished:
            return f"process {rank} {KILLED}"
        if host == socket.gethostname() or not self.store.check([f"beat/{rank}"]):
            return None
        said, now = self.store.get(f"beat/{rank}"), time.monotonic()
        before, at = self._heard.get(rank, (b"", now))
        self._heard[rank] = (said, now if said != before else at)
        if now - self._heard[rank][1] > self.times.silent:
            return f"process {rank} on {host} has not been heard of for {now - at:.0f} s: machine or network down"
        return None

    def _beat(self, number: int) -> None:
        try:
            self.store.set(f"beat/{self.rank}", str(number))
        except RuntimeError:
            logger.debug("the store is gone", exc_info=True)

    def _watch(self) -> None:
        number = 0
        while not self._is_over.wait(self.times.beat):
            self._beat(number := number + 1)
            found = self.find()
            if found is not None and not self._is_over.is_set():
                self.lost = found
                break
        if self.lost is None:
            return
        if self.rank == 0:
            try:
                self.store.set("lost", self.lost)
            except RuntimeError:
                logger.debug("the store is gone", exc_info=True)
        if self._is_over.wait(self.times.say) or self.is_told:
            return
        logger.error("%s; this process ends too, in %.0f s at the latest", self.lost, self.times.end)
        if self._is_over.wait(self.times.end) or self.is_told:
            return
        logging.shutdown()
        self.quit(1)


def has_ended(process: str) -> bool:
    """Whether a process, as host and number, is known to have ended: one on another machine is not."""
    host, _, number = process.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
