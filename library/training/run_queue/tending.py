"""Running jobs: requests are passed on to their trainings, and jobs whose training has ended are put where they
belong."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from library.training.run_queue.folder import Queue, State
from library.training.run_queue.tickets import Claim, Ticket
from library.training.run_queue.trainings import interrupt, kill

logger = logging.getLogger(__name__)

MOST_LOSSES = 2  # restarts of a job whose process was killed
FIRST_SIGNAL = 128  # exit statuses from here on are those of signals
NUM_LINES, LAST_BYTES = 20, 20_000


def list_orphans(queue: Queue) -> Iterator[tuple[Ticket, Claim]]:
    """Yield the running jobs of this machine whose queue was killed."""
    # Twice, because a name that changes meanwhile may be in no listing.
    tickets = {ticket.number: ticket for _ in range(2) for ticket in queue.list_tickets("running")}
    for ticket in tickets.values():
        claim = ticket.claim
        if claim is not None and claim.is_here and not claim.runner.is_alive:
            yield ticket, claim


def tend_orphans(queue: Queue) -> list[Ticket]:
    """Look after the jobs of killed queues; return those whose trainings go on."""
    going_on = []
    for ticket, claim in list_orphans(queue):
        if claim.is_training:
            forward_requests(queue, ticket)
            going_on.append(ticket)
        # The name may be older than the end of its training, and a new one has the exit status.
        elif (now := queue.find_running(ticket.number)) is not None and now.claim is not None:
            is_over = now.claim.runner == claim.runner and not now.claim.is_training
            finish_job(queue, now, now.claim.status) if is_over else going_on.append(now)
    return going_on


def forward_requests(queue: Queue, ticket: Ticket) -> None:
    """Pass requests on to a training that has entered itself into its ticket."""
    process = None if ticket.claim is None else ticket.claim.process
    if process is None:
        return
    if queue.is_requested(ticket, "kill"):
        kill(process)
    elif queue.is_requested(ticket, "stop", "remove") and queue.is_first_signal(ticket):
        logger.info("job %d: saving and ending", ticket.number)
        try:
            interrupt(process)
        except OSError as error:  # Windows, where a signal reaches the processes of one terminal alone
            message = "job %d cannot be reached (%s); `run_queue.py stop --now` ends it without saving"
            logger.warning(message, ticket.number, error)


def finish_job(queue: Queue, ticket: Ticket, status: int | None) -> State | None:
    """Put away a job whose process has ended, with its exit status; None if it was killed.

    Return where the job is now; None if it was removed, or if another process was faster. Raises OSError if the folder
    cannot be written: the job is then where it was.
    """
    target, losses, words = judge(queue, ticket, status)
    if target is None:
        queue.delete("running", ticket)
    elif target == "failed":
        lines = last_lines(queue, ticket)
        with suppress(OSError):  # a full disk: the log has them too
            queue.last_lines_of(ticket).write_text("\n".join(lines), encoding="utf-8", newline="\n")
        words += f": {lines[-1]}" if lines else ""
    # Before the job moves: nobody else removes requests of this claim.
    queue.forget_requests(ticket)
    if target is not None and not queue.move(ticket, "running", target, Ticket(ticket.number, losses)):
        return None
    logger.log(logging.ERROR if target == "failed" else logging.INFO, "job %d: %s", ticket.number, words)
    return target


def judge(queue: Queue, ticket: Ticket, status: int | None) -> tuple[State | None, int, str]:
    """Return where a job goes whose process has ended, its losses, and the words for the log."""
    if queue.is_requested(ticket, "remove"):
        return None, ticket.losses, "removed"
    if status == 0:
        return "done", ticket.losses, "done"
    if status is not None and 0 < status < FIRST_SIGNAL:
        return "failed", ticket.losses, f"failed with status {status}"
    if queue.is_requested(ticket, "stop", "kill"):
        return "waiting", ticket.losses, "stopped; it waits, and resumes"
    if ticket.losses < MOST_LOSSES:
        return "waiting", ticket.losses + 1, "its process was ended; it waits in front, and resumes"
    return "failed", ticket.losses, f"failed: its process was ended {ticket.losses + 1} times"


def last_lines(queue: Queue, ticket: Ticket) -> list[str]:
    """Return the last lines of a job's log; of a progress bar its last state."""
    try:
        with queue.log_of(ticket).open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - LAST_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line][-NUM_LINES:]


def release_claim(queue: Queue, ticket: Ticket) -> None:
    """Give a claimed job back that was not started."""
    queue.move(ticket, "running", "waiting", replace(ticket, claim=None))
