"""`run`: takes one job after another, one at a time on each GPU."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from library.training.failures.interruption import HANGUP, STOP_SIGNALS
from library.training.run_queue.folder import Queue
from library.training.run_queue.jobs import Job
from library.training.run_queue.tending import finish_job, forward_requests, release_claim, tend_orphans
from library.training.run_queue.tickets import Claim, ProcessId, Ticket, host_name
from library.training.run_queue.trainings import ROOT, start_training
from library.training.saving.run_lock import acquire, release

logger = logging.getLogger(__name__)

POLL_S = 0.05
MISSING_POLLS = 40  # a file that is renamed may be in no listing of its folder
INTERRUPTED = 130


def run_queue(queue: Queue, slots: Sequence[str], scripts: Path = ROOT) -> int:
    """Train the waiting jobs until none is left, one at a time in each slot, or until the queue is stopped. `scripts`
    is the folder of the training scripts.

    Return the exit status: 0, 1 if a job failed, 130 after a signal. Raises UserError if another process of this
    machine has one of the slots, OSError if jobs cannot be started.
    """
    runner, last_stop = Runner(queue, slots, scripts), queue.read_stop()
    with holding_slots(queue, slots), counting_signals() as signals:
        while runner.work():
            if signals.count or queue.read_stop() != last_stop:
                runner.stop(now=signals.count > 1)
            time.sleep(POLL_S)
    if runner.problem is not None:
        raise runner.problem
    return INTERRUPTED if signals.count else int(runner.num_failed > 0)


@contextmanager
def holding_slots(queue: Queue, slots: Sequence[str]) -> Iterator[None]:
    """Keep other processes of this machine out of the slots inside the block. Raises UserError if one has them."""
    with ExitStack() as stack:
        for slot in slots:
            path = queue.folder / f".{host_name()}-{quote(slot, '')}.lock"
            what = f"another run trains the jobs of this queue on GPU {slot}" if slot else "this queue is running"
            file = acquire(path, what, "it takes new jobs too; for another GPU use `run --gpus`")
            if file is not None:
                stack.callback(release, file, path)
        yield


@dataclass
class Signals:
    """The number of signals that ask this process to end."""

    count: int = 0

    def add(self, number: int, frame: FrameType | None) -> None:
        # A closing terminal may send several, but after the second no training saves.
        self.count = max(self.count, 1) if number == HANGUP else self.count + 1


@contextmanager
def counting_signals() -> Iterator[Signals]:
    """Count the signals inside the block, which end nothing. SIGHUP stays ignored if it is, as under nohup."""
    signals = Signals()
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if number != HANGUP or former[number] != signal.SIG_IGN:
            signal.signal(number, signals.add)
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Child:
    """The process of a job's training, from its start until the job is put away."""

    process: "subprocess.Popen[bytes]"
    slot: str


@dataclass
class Runner:
    """A process that takes jobs."""

    queue: Queue
    slots: Sequence[str]
    scripts: Path = ROOT
    me: ProcessId = field(default_factory=ProcessId.current)
    children: dict[int, Child] = field(default_factory=dict)  # by number of the job
    missing: dict[int, int] = field(default_factory=dict)  # number of the job -> polls without its file
    warnings: set[str] = field(default_factory=set)  # logged ones
    unreadable: set[int] = field(default_factory=set)  # numbers of waiting files that are no jobs
    problem: OSError | None = None  # why it starts no further jobs
    is_stopping: bool = False
    num_failed: int = 0

    def work(self) -> bool:
        """Put away what has ended and start what fits; return False when nothing is left to do."""
        busy = {slot for slot in self.tend() if slot in self.slots}
        started = [self.start_next(slot) for slot in self.slots if slot not in busy]
        return bool(busy or any(started))

    def stop(self, now: bool) -> None:
        """Start no further jobs, and let the trainings save and end; with `now` they end without saving."""
        self.is_stopping = True
        for ticket in self.queue.list_tickets("running"):
            claim = ticket.claim
            if claim is not None and claim.is_here and claim.slot in self.slots:
                try:
                    self.queue.request(ticket, "kill" if now else "stop")
                except OSError as error:
                    self.warn(error)

    def tend(self) -> list[str]:
        """Look after the jobs of this process, and of killed ones; return the slots that are taken."""
        orphans = []
        try:
            orphans = tend_orphans(self.queue)
        except OSError as error:
            self.warn(error)
        for number, child in list(self.children.items()):
            status = child.process.poll()  # before its file's name is read, which then is the last
            ticket = self.queue.find_running(number)
            is_ours = ticket is not None and ticket.claim is not None and ticket.claim.runner == self.me
            if status is not None and (ticket is None or not is_ours or self.put_away(ticket, status)):
                del self.children[number]
            elif status is None and ticket is not None and is_ours:
                self.missing.pop(number, None)
                forward_requests(self.queue, ticket)
            elif status is None:
                self.end_removed(number, child.process)
        return [*(ticket.claim.slot for ticket in orphans if ticket.claim), *(c.slot for c in self.children.values())]

    def end_removed(self, number: int, child: "subprocess.Popen[bytes]") -> None:
        """Let a training save and end whose job was deleted from another machine."""
        self.missing[number] = self.missing.get(number, 0) + 1
        if self.missing[number] == MISSING_POLLS:
            logger.warning("job %d was removed: ending it", number)
            child.terminate()

    def put_away(self, ticket: Ticket, status: int) -> bool:
        """Finish a job of this process; return False if that has to be tried again."""
        assert ticket.claim is not None
        known = ticket.claim.status if ticket.claim.status is not None else status if status >= 0 else None
        try:
            self.num_failed += finish_job(self.queue, ticket, known) == "failed"
        except OSError as error:
            self.warn(error)
            return self.is_stopping  # then the next `run` finishes it
        return True

    def start_next(self, slot: str) -> bool:
        """Claim and start the first waiting job; return False if there is none."""
        if self.is_stopping or self.problem is not None:
            return False
        for ticket in self.queue.list_tickets("waiting"):
            if ticket.number in self.unreadable:
                continue
            try:
                job = self.queue.read_job("waiting", ticket)
                if job is None:
                    self.unreadable.add(ticket.number)
                    continue
                claimed = self.queue.claim(ticket, Claim(host_name(), self.me, None, slot))
            except FileNotFoundError:
                continue
            except OSError as error:
                self.problem = error
                return False
            if claimed is not None:
                self.start(claimed, job)
                return True
        return False

    def start(self, ticket: Ticket, job: Job) -> None:
        """Start a claimed job, or give it back if this machine cannot start any."""
        try:
            if not os.path.isdir(job.folder):
                with self.queue.log_of(ticket).open("a", encoding="utf-8") as log:
                    log.write(f"the working folder {job.folder} is gone; create it, and add the job again\n")
                self.num_failed += finish_job(self.queue, ticket, 1) == "failed"
                return
            assert ticket.claim is not None
            slot = ticket.claim.slot
            self.children[ticket.number] = Child(start_training(self.queue, ticket, job, self.scripts), slot)
            logger.info("job %d: started%s: %s", ticket.number, f" on GPU {slot}" if slot else "", job.name)
        except OSError as error:  # a full disk, or no memory for a process: every job would fail
            self.problem = error
            with suppress(OSError):  # then the next `run` finds it
                release_claim(self.queue, ticket)

    def warn(self, error: OSError) -> None:
        """Log an error that is tried again."""
        if str(error) not in self.warnings:
            self.warnings.add(str(error))
            logger.warning("%s; trying again", error)
