"""The file names of jobs, which hold their whole state: number, lost processes, and who runs them."""

import os
import re
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote, unquote

PROC = Path("/proc")
NAME = re.compile(
    r"(?P<number>\d{6,})(\.(?P<losses>\d+))?"
    r"(@(?P<host>[^@]+)@(?P<runner>[^@]+)@(?P<process>[^@]*)@(?P<slot>[^@]*)(@(?P<status>\d+))?)?\.json"
)


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine. The system reuses process IDs, so the start time belongs to it."""

    pid: int
    start: str

    @classmethod
    def parse(cls, text: str) -> "ProcessId":
        pid, _, start = text.partition("-")
        return cls(int(pid) if pid.isdigit() else 0, start)

    @classmethod
    def current(cls) -> "ProcessId":
        return cls(os.getpid(), find_start(os.getpid()) or "")

    def __str__(self) -> str:
        return f"{self.pid}-{self.start}"

    @property
    def is_alive(self) -> bool:
        return self.pid > 0 and find_start(self.pid) == self.start


def find_start(pid: int) -> str | None:
    """Return what tells this process from others with its ID; None if it has ended."""
    if sys.platform == "linux":
        # psutil adds the system's start, which moves when the clock is set. Ticks since then do not.
        try:
            fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{read_boot_id()}.{fields[19]}"  # Z, X: ended, not yet waited for
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.Error:
        return None


@cache
def read_boot_id() -> str:
    """Return an ID of the system's start, since ticks count from there."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return ""


def host_name() -> str:
    """Return this machine's name, without the domain, which changes with the network."""
    return socket.gethostname().partition(".")[0] or "localhost"


@dataclass(frozen=True)
class Claim:
    """The processes that run a job."""

    host: str
    runner: ProcessId
    process: ProcessId | None  # the training; None until it has started
    slot: str  # the GPU; "" without --gpus
    status: int | None = None  # exit status of the training; None until it ends, and if it was killed

    @property
    def is_here(self) -> bool:
        return self.host == host_name()

    @property
    def is_training(self) -> bool:
        """True while the training's process lives; known on its own machine only."""
        return self.process is not None and self.process.is_alive


@dataclass(frozen=True)
class Ticket:
    """The name of a job's file."""

    number: int
    losses: int = 0  # how often the job's process was lost
    claim: Claim | None = None  # None unless it runs

    @classmethod
    def parse(cls, file_name: str) -> "Ticket | None":
        """Read a file's name; None if it is no job's."""
        match = NAME.fullmatch(file_name)
        if match is None:
            return None
        number, losses = int(match["number"]), int(match["losses"] or 0)
        if match["host"] is None:
            return cls(number, losses)
        process = ProcessId.parse(match["process"]) if match["process"] else None
        status = None if match["status"] is None else int(match["status"])
        runner = ProcessId.parse(match["runner"])
        return cls(number, losses, Claim(unquote(match["host"]), runner, process, unquote(match["slot"]), status))

    @property
    def id(self) -> str:
        """The beginning of the names of all files of the job."""
        return f"{self.number:06d}"

    @property
    def file_name(self) -> str:
        name = f"{self.id}.{self.losses}" if self.losses else self.id
        if self.claim is not None:
            claim = self.claim
            parts = [quote(claim.host, ""), claim.runner, claim.process or "", quote(claim.slot, "")]
            parts += [] if claim.status is None else [claim.status]
            name = "@".join([name, *map(str, parts)])
        return f"{name}.json"
