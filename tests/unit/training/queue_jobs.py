"""Queues of a small script that stands in for a training."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from library.training.run_queue.folder import Queue
from library.training.run_queue.jobs import Job
from library.training.run_queue.tickets import ProcessId, Ticket
from tests.running import ROOT

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from library.training.run_queue.tickets import ProcessId

config, (folder, name, *acts) = sys.argv[2], [word for word in sys.argv[3:] if not word.startswith("--")]
folder, own = Path(folder), str(ProcessId.current())
busy = folder / f"{name}.busy"
if busy.exists() and ProcessId.parse(busy.read_text()).is_alive:
    (folder / f"{name}.overlaps").touch()
busy.write_text(own)

def note(text):
    with (folder / f"{name}.txt").open("a") as file:
        file.write(text + "\\n")

def save(number, frame):
    note("saved")
    busy.unlink()
    sys.exit(128 + number)

is_first = not (folder / f"{name}.txt").exists()
note("started")
if "config" in acts:
    note(Path(config).read_text().strip())
if "gpu" in acts:
    note(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
if "fails" in acts:
    print("\\n".join(f"line {number}" for number in range(30)))
    sys.exit(3)
if "waits" in acts and is_first:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in acts else save)
    (folder / f"{name}.waits").touch()
    while not (folder / f"{name}.goes").exists():
        time.sleep(0.01)
time.sleep(0.02)
note("done")
busy.unlink()
"""
RUN = """
import logging, sys
from pathlib import Path
from library.training.run_queue.folder import Queue
from library.training.run_queue.runner import run_queue
logging.basicConfig(level=logging.INFO)
sys.exit(run_queue(Queue(Path(sys.argv[1])), sys.argv[3:], Path(sys.argv[2])))
"""
MOST_S = 120  # far above what any wait takes; a busy machine is no failure


class StandIns:
    """A queue in a folder whose name has a space, and the files that its jobs write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs of é"
        self.folder.mkdir()
        (self.folder / "stand_in.py").write_text(SCRIPT)
        self.queue = Queue(self.folder / "queue")
        self.queue.create()

    def add(self, name: str, *acts: str) -> Ticket:
        options = (str(self.folder), name, *acts)
        output = str(self.folder / "out" / name)
        return self.queue.add(Job("stand_in.py", "given.toml", "seed = 1\n", options, str(self.folder), output, None))

    def start_run(self, *slots: str) -> "subprocess.Popen[str]":
        """Start a process that runs jobs."""
        command = [sys.executable, "-c", RUN, str(self.queue.folder), str(self.folder), *(slots or ("",))]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "RANK": "0"})

    def notes_of(self, name: str) -> list[str]:
        path = self.folder / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []

    def waits(self, name: str) -> bool:
        return (self.folder / f"{name}.waits").exists()

    def process_of(self, ticket: Ticket) -> ProcessId:
        running = self.queue.find_running(ticket.number)
        assert running is not None and running.claim is not None and running.claim.process is not None
        return running.claim.process

    def numbers(self) -> dict[str, list[int]]:
        """The jobs by state, without empty ones."""
        states = {name: self.queue.list_tickets(name) for name in ("waiting", "running", "done", "failed")}
        return {name: [ticket.number for ticket in tickets] for name, tickets in states.items() if tickets}


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MOST_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
