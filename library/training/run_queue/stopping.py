"""`stop` and `remove`."""

import logging
import time
from collections.abc import Iterable

from library.base.errors import error_in
from library.training.run_queue.folder import Queue
from library.training.run_queue.runner import POLL_S
from library.training.run_queue.tending import tend_orphans
from library.training.run_queue.tickets import Ticket

logger = logging.getLogger(__name__)


def stop_queue(queue: Queue, now: bool) -> None:
    """End every `run` and wait until the trainings have saved; with `now` they end without saving."""
    queue.stop_all()
    runners = {ticket.claim.runner for ticket in queue.list_tickets("running") if ticket.claim}
    said, asked = set[int](), set[Ticket]()
    while running := [t for t in queue.list_tickets("running") if t.claim and t.claim.runner in runners]:
        for ticket in running:
            queue.request(ticket, "kill" if now else "stop")
            asked.add(ticket)
        tend_orphans(queue)
        say_waiting(running, said)
        time.sleep(POLL_S)
    for ticket in asked:  # a request may have come after the end of its training
        queue.forget_requests(ticket)


def remove_job(queue: Queue, number: int, now: bool) -> None:
    """Remove a job; one that is training saves and ends first, or ends without saving with `now`.

    Raises UserError if there is no such job.
    """
    said: set[int] = set()
    while (found := queue.find(number)) is not None:
        state, ticket = found
        if state != "running" or (now and ticket.claim is not None and not ticket.claim.is_here):
            if queue.delete(state, ticket):
                logger.info("job %d: removed", number)
                return
            continue
        queue.request(ticket, "remove")
        if now:
            queue.request(ticket, "kill")
        tend_orphans(queue)
        say_waiting([ticket], said)
        time.sleep(POLL_S)
    if not said:
        raise error_in(path=queue.folder)(
            f"there is no job {number} in --folder {queue.folder}; `list` shows the numbers"
        )


def say_waiting(tickets: Iterable[Ticket], said: set[int]) -> None:
    """Log once for each job that its training is waited for."""
    for ticket in tickets:
        if ticket.number not in said and ticket.claim is not None:
            said.add(ticket.number)
            place = "" if ticket.claim.is_here else f" on {ticket.claim.host}"
            logger.info("waiting until job %d%s has saved and ended; Ctrl-C stops waiting", ticket.number, place)
