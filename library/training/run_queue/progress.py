"""`list`: every job in a line, with its progress from its events."""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.formatting import align_columns
from library.base.json_text import InvalidJson, parse_json
from library.base.terminal import escape_controls
from library.training.report_page.page import ENDING
from library.training.run_queue.folder import STATES, Queue, State
from library.training.run_queue.jobs import Job
from library.training.run_queue.tickets import Ticket

TAIL_BYTES = 2**18  # enough for hundreds of steps, or for some previews between them
PLAN = b'"event":"plan"'
TITLES = ("job", "state", "name", "step", "loss", "left", "")


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None  # averaged
    seconds_left: float | None = None


def read_progress(path: Path) -> Progress:
    """Read the end of an events file, which may be long and still be written; empty if there is none."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            at = text.rfind(PLAN)
            start = text.rfind(b"\n", 0, at) + 1 if at >= 0 else 0
            plan = list(parse_lines(text[start : text.find(b"\n", at) + 1])) if at >= 0 else []
            tail = text[max(start, len(text) - TAIL_BYTES) :]
    except (OSError, ValueError):  # ValueError: an empty file
        return Progress()
    max_steps = next((line["max_train_steps"] for line in plan if isinstance(line.get("max_train_steps"), int)), None)
    steps = [line for line in parse_lines(tail) if line.get("event") == "step" and is_step(line)]
    if not steps:
        return Progress(max_steps=max_steps)
    first, last = steps[0], steps[-1]
    num_steps, seconds = last["step"] - first["step"], last["time"] - first["time"]
    left = (max_steps - last["step"]) * seconds / num_steps if max_steps is not None and num_steps > 0 else None
    return Progress(last["step"], max_steps, last.get("average"), left)


def parse_lines(text: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events among the lines; others, such as a cut one at either end, are skipped."""
    for line in text.splitlines():
        with suppress(InvalidJson):
            value = parse_json(line) if line.startswith(b"{") else None
            if isinstance(value, dict):
                yield value


def is_step(line: dict[str, Any]) -> bool:
    return (
        isinstance(line.get("step"), int)
        and isinstance(line.get("time"), int | float)
        and isinstance(line.get("average"), int | float | None)
    )


def format_queue(queue: Queue) -> list[str]:
    """Return the lines of `list`."""
    rows = [
        [str(ticket.number), state, *describe(queue, state, ticket)]
        for state in STATES
        for ticket in queue.list_tickets(state)
    ]
    return [escape_controls(line) for line in align_columns([TITLES, *rows])] if rows else ["no jobs"]


def describe(queue: Queue, state: State, ticket: Ticket) -> list[str]:
    """Return name, step, loss, minutes left, and a remark."""
    try:
        job = queue.read_job(state, ticket)
    except FileNotFoundError:
        job = None
    if job is None:
        return ["?", "", "", "", "unreadable, or just moved"]
    progress = read_progress(queue.events_of(ticket, job))
    step = "" if progress.step is None else f"{progress.step}/{progress.max_steps or '?'}"
    loss = "" if progress.loss is None else f"{progress.loss:.4f}"
    left = f"{progress.seconds_left / 60:.0f} min" if state == "running" and progress.seconds_left is not None else ""
    return [job.name, step, loss, left, remark(queue, state, ticket, job)]


def remark(queue: Queue, state: State, ticket: Ticket, job: Job) -> str:
    """Return why a job failed, where it runs, or its report."""
    if state == "failed":
        with suppress(OSError):
            lines = queue.last_lines_of(ticket).read_text(encoding="utf-8", errors="replace").splitlines()
            return lines[-1] if lines else "no output"
    if state == "waiting":
        return "resumes" if ticket.losses or queue.log_of(ticket).exists() else ""
    report = Path(job.output + ENDING)
    places = [str(report)] if report.exists() else []
    if ticket.claim is not None:
        places += [] if ticket.claim.is_here else [f"on {ticket.claim.host}"]
        places += [f"GPU {ticket.claim.slot}"] if ticket.claim.slot else []
    return ", ".join(places)
