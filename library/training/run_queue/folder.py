"""The folder of a queue."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from uuid import uuid4

from library.base.atomic_files import write_whole
from library.base.errors import UserError, about, error_in
from library.checkpoints.overwriting import known_by_start
from library.training.run_queue.jobs import Job
from library.training.run_queue.tickets import Claim, Ticket
from library.training.saving.run_lock import Locked, acquire, release, unwritable

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed"]
Request = Literal["stop", "remove", "kill"]
STATES: tuple[State, ...] = ("running", "waiting", "done", "failed")
REQUESTS: tuple[Request, ...] = ("stop", "remove", "kill")
HEAD = "A queue of trainings: see docs/queue.md. Its files are renamed and removed by tools/run_queue.py.\n"
MARK = known_by_start("the mark of a queue", lambda start: start.decode("utf-8", "replace") == HEAD)
LOCKED_S, POLL_S, RETRIES = 30.0, 0.05, 10


@dataclass(frozen=True)
class Queue:
    """A folder with the jobs in `waiting`, `running`, `done` and `failed`, and their logs.

    Every method may run in several processes at once, on several machines if they share the folder.
    """

    folder: Path

    @property
    def mark(self) -> Path:
        return self.folder / "queue.txt"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def log_of(self, ticket: Ticket) -> Path:
        return self.logs / f"{ticket.id}.log"

    def events_of(self, ticket: Ticket, job: Job) -> Path:
        if job.events == "-":  # standard output
            return self.log_of(ticket)
        return Path(job.events) if job.events else self.logs / f"{ticket.id}.jsonl"

    def last_lines_of(self, ticket: Ticket) -> Path:
        """The end of a failed job's log."""
        return self.folder / "failed" / f"{ticket.id}.txt"

    def path(self, state: State, ticket: Ticket) -> Path:
        return self.folder / state / ticket.file_name

    def create(self) -> None:
        """Create the folder. Raises UserError for one that holds other files, or that cannot be written."""
        if not self.mark.exists() and self.folder.is_dir() and any(self.folder.iterdir()):
            reason = "holds other files than a queue; use a new folder"
            raise about("--folder", self.folder, cause="would be lost")(reason)
        try:
            # For the owner alone, because whoever writes here decides what this user's trainings load.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in (*STATES, "logs", "requests"):
                (self.folder / name).mkdir(exist_ok=True)
            if not self.mark.exists():
                write_whole(self.mark, HEAD)
        except OSError as error:
            raise unwritable("--folder", self.folder, error) from None

    def require(self) -> None:
        """Raise UserError unless the folder is a queue's."""
        if not (self.mark.is_file() and MARK.is_own(self.mark)):
            reason = "is no queue; `python3 tools/run_queue.py add` makes one"
            raise about("--folder", self.folder)(reason)

    def list_tickets(self, state: State) -> list[Ticket]:
        """List the jobs in the order in which they were added."""
        with suppress(FileNotFoundError):
            tickets = (Ticket.parse(entry.name) for entry in os.scandir(self.folder / state))
            return sorted((ticket for ticket in tickets if ticket is not None), key=lambda ticket: ticket.number)
        return []

    def read_jobs(self, *states: State) -> Iterator[tuple[Ticket, Job | None]]:
        """Yield the jobs; None for a file that cannot be read."""
        for state in states:
            for ticket in self.list_tickets(state):
                with suppress(FileNotFoundError):
                    yield ticket, self.read_job(state, ticket)

    def read_job(self, state: State, ticket: Ticket) -> Job | None:
        """Read a job; None, with a warning, for a damaged file. Raises FileNotFoundError if it has moved."""
        try:
            return Job.read(self.path(state, ticket))
        except UserError as error:
            logger.warning("%s", error)
            return None

    def find(self, number: int) -> tuple[State, Ticket] | None:
        """Find a job. It may move meanwhile, so the answer may be out of date."""
        for state in STATES * 2:  # twice: it may move to where was looked before
            for ticket in self.list_tickets(state):
                if ticket.number == number:
                    return state, ticket
        return None

    def find_running(self, number: int) -> Ticket | None:
        return next((ticket for ticket in self.list_tickets("running") if ticket.number == number), None)

    def move(self, ticket: Ticket, origin: State, target: State, renamed: Ticket) -> bool:
        """Move a job; return False if another process has moved it before. Raises OSError if it cannot be moved."""
        for is_last in (*(False,) * RETRIES, True):
            try:
                os.rename(self.path(origin, ticket), self.path(target, renamed))
                break
            except FileNotFoundError:
                return False
            except PermissionError:  # on Windows also while another process reads the file
                if is_last:
                    raise
                time.sleep(POLL_S)
        return True

    def claim(self, ticket: Ticket, claim: Claim) -> Ticket | None:
        """Take a waiting job; None if another process was faster."""
        claimed = replace(ticket, claim=claim)
        return claimed if self.move(ticket, "waiting", "running", claimed) else None

    # Adding

    def add(self, job: Job) -> Ticket:
        """Add a job behind the others. Raises UserError if another one writes the same files."""
        with self.locked():
            for ticket, other in self.read_jobs("running", "waiting", "running"):  # a job may move meanwhile
                if other is not None and os.path.normcase(other.output) == os.path.normcase(job.output):
                    raise error_in("--output_name", others=["--output_dir"], path=other.output, cause="would be lost")(
                        f"job {ticket.number} ({other.config}) writes {other.output} too",
                        "use another --output_name or --output_dir",
                    )
            # Also behind the logs of removed jobs, which another job must not continue.
            names = (entry.name.partition(".")[0] for state in (*STATES, "logs") for entry in self.entries(state))
            taken = (name.partition("@")[0] for name in names)
            new = Ticket(1 + max((int(name) for name in taken if name.isdecimal()), default=0))
            write_whole(self.path("waiting", new), job.as_text())
        return new

    def entries(self, name: str) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder / name) as entries:
            yield from entries

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process adds a job."""
        path, deadline = self.folder / ".add.lock", time.monotonic() + LOCKED_S
        while True:
            try:
                file = acquire(path, "another process is adding a job", "try again")
                break
            except Locked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)
        try:
            yield
        finally:
            if file is not None:
                release(file, path)

    # Requests

    def request_path(self, ticket: Ticket, name: str) -> Path:
        """The file that asks something of a claimed job; the next claim of the job has another name."""
        assert ticket.claim is not None
        return self.folder / "requests" / f"{ticket.id}.{ticket.losses}@{ticket.claim.runner}.{name}"

    def request(self, ticket: Ticket, request: Request) -> None:
        """Ask whoever looks after a running job; asking twice is as asking once."""
        self.request_path(ticket, request).touch()

    def is_requested(self, ticket: Ticket, *requests: Request) -> bool:
        return any(self.request_path(ticket, request).exists() for request in requests or REQUESTS)

    def is_first_signal(self, ticket: Ticket) -> bool:
        """Return True in one of all calls for a claimed job: a second signal would end a training without saving."""
        try:
            self.request_path(ticket, "signalled").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def forget_requests(self, ticket: Ticket) -> None:
        for name in (*REQUESTS, "signalled"):
            self.request_path(ticket, name).unlink(missing_ok=True)

    def stop_all(self) -> None:
        """Ask every process that runs jobs to start no further ones."""
        write_whole(self.folder / "stop", uuid4().hex)

    def read_stop(self) -> str:
        """Return the last request to stop. Those that came before a process started do not concern it."""
        with suppress(FileNotFoundError):
            return (self.folder / "stop").read_text(encoding="utf-8")
        return ""

    # Removing

    def delete(self, state: State, ticket: Ticket) -> bool:
        """Delete a job with its log; return False if it has moved. Adapters and states stay."""
        try:
            self.path(state, ticket).unlink()
        except FileNotFoundError:
            return False
        logs = (self.logs / f"{ticket.id}{ending}" for ending in (".log", ".jsonl", ".toml"))
        for path in (self.last_lines_of(ticket), *logs):
            with suppress(OSError):  # on Windows another program may show it
                path.unlink(missing_ok=True)
        return True
