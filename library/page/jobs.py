"""The trainings: those of the queue, and those that were stopped and may go on."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import UserError, of_file
from library.base.json_text import parse_json
from library.environment.torch_builds import read
from library.page.model_folders import find_adapter_folders
from library.page.store import Store, shorten_hash
from library.training.loop.requests import DRAW_NOW, SAVE_NOW
from library.training.report_page.page import ENDING
from library.training.run_queue.folder import State
from library.training.run_queue.jobs import Job
from library.training.run_queue.progress import read_progress, remark
from library.training.run_queue.tending import last_lines, tend_orphans
from library.training.run_queue.tickets import Ticket
from library.training.run_queue.trainings import ROOT, group_options
from library.training.saving.state_names import MANIFEST_FILE

SHOWN: tuple[State, ...] = ("done", "failed", "waiting", "running")  # a later one of the same adapter wins
REQUESTS = {"draw_now": DRAW_NOW, "save_now": SAVE_NOW}
WEIGHTS, STEP = ".safetensors", re.compile(r"-step(\d{1,12})-")
SMI = ("nvidia-smi", "--query-compute-apps=pid,process_name,used_gpu_memory", "--format=csv,noheader")


def id_of(job: Job) -> str:
    return shorten_hash(job.output)


@dataclass
class Trainings:
    """The trainings of a store, and the process that runs its queue."""

    store: Store
    runner: "subprocess.Popen[bytes] | None" = None
    is_wanted: bool = False  # jobs that wait are to be trained

    # --- what there is ---

    def list_all(self) -> list[dict[str, Any]]:
        """Return the trainings as values, the order of the queue first."""
        queue, found = self.store.queue, dict[str, dict[str, Any]]()
        for job in self.list_stopped():
            is_done = Path(job.output + WEIGHTS).exists()
            found[id_of(job)] = describe(job, "done" if is_done else "stopped")
        for state in SHOWN:
            for ticket in queue.list_tickets(state):
                with suppress(FileNotFoundError):
                    if (known := queue.read_job(state, ticket)) is not None:
                        found.pop(id_of(known), None)
                        found[id_of(known)] = self.describe_job(state, ticket, known)
        for run_id, run in found.items():
            run["can_repeat"] = self.store.has_origin(run_id)
        order = {name: number for number, name in enumerate(("running", "waiting", "stopped", "failed", "done"))}
        return sorted(found.values(), key=lambda run: (order[run["state"]], run["number"] or 0))

    def describe_job(self, state: State, ticket: Ticket, job: Job) -> dict[str, Any]:
        queue = self.store.queue
        progress = read_progress(queue.events_of(ticket, job))
        is_stopping = ticket.claim is not None and queue.is_requested(ticket)
        return {
            **describe(job, state),
            "number": ticket.number,
            "step": progress.step,
            "max_steps": progress.max_steps,
            "loss": progress.loss,
            "seconds_left": progress.seconds_left if state == "running" else None,
            "remark": remark(queue, state, ticket, job) if state == "failed" else "",
            "is_stopping": is_stopping,
            "requests": [name for name, ending in REQUESTS.items() if Path(job.output + ending).exists()],
        }

    def list_stopped(self) -> Iterator[Job]:
        for path in sorted(self.store.stopped.glob("*.json")):
            with suppress(UserError, FileNotFoundError):
                yield Job.read(path)

    def find(self, run_id: str) -> tuple[State, Ticket, Job] | None:
        """Return the job of the queue with this ID, one that runs before one that waits."""
        for state in reversed(SHOWN):
            for ticket in reversed(self.store.queue.list_tickets(state)):
                with suppress(FileNotFoundError):
                    job = self.store.queue.read_job(state, ticket)
                    if job is not None and id_of(job) == run_id:
                        return state, ticket, job
        return None

    def find_job(self, run_id: str) -> Job | None:
        found = self.find(run_id)
        return found[2] if found else next((job for job in self.list_stopped() if id_of(job) == run_id), None)

    def read_log(self, run_id: str) -> list[str]:
        found = self.find(run_id)
        return last_lines(self.store.queue, found[1]) if found else []

    def list_pids(self) -> frozenset[int]:
        """Return the processes of the trainings that run."""
        claims = [ticket.claim for ticket in self.store.queue.list_tickets("running")]
        return frozenset(claim.process.pid for claim in claims if claim is not None and claim.process is not None)

    # --- what is done ---

    def stopped_path(self, run_id: str) -> Path:
        return self.store.stopped / f"{run_id}.json"

    def stop(self, run_id: str) -> bool:
        """Let a training save and end, or take it out of the queue; it can go on later. Return False if there is no
        such job."""
        found = self.find(run_id)
        if found is None or found[0] not in ("running", "waiting"):
            return False
        state, ticket, job = found
        write_whole(self.stopped_path(run_id), job.as_text())
        if state == "running":
            self.store.queue.request(ticket, "remove")
            return True
        return self.store.queue.delete(state, ticket) or self.stop(run_id)  # it may have started meanwhile

    def request(self, run_id: str, name: str) -> bool:
        """Let a training draw or save after its step. Return False if it does not run."""
        found = self.find(run_id)
        if found is None or found[0] != "running":
            return False
        path = Path(found[2].output + REQUESTS[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return True

    def go_on(self, run_id: str) -> bool:
        """Put a stopped or failed training back into the queue, behind the others."""
        found = self.find(run_id)
        if found is not None and found[0] == "waiting":
            self.stop(run_id)  # to the end of the queue
        elif found is not None and found[0] == "failed":
            write_whole(self.stopped_path(run_id), found[2].as_text())
            self.store.queue.delete(found[0], found[1])
        job = next((job for job in self.list_stopped() if id_of(job) == run_id), None)
        if job is None:
            return False
        self.store.queue.add(job)
        self.stopped_path(run_id).unlink(missing_ok=True)
        self.run()
        return True

    def remove(self, run_id: str) -> bool:
        """Take a training that does not run off the list; its files stay."""
        found = self.find(run_id)
        if found is not None and (found[0] == "running" or not self.store.queue.delete(found[0], found[1])):
            return False
        path = self.stopped_path(run_id)
        is_there = path.exists()
        path.unlink(missing_ok=True)
        return found is not None or is_there

    def copy(self, run_id: str, name: str, folder: str) -> bool:
        """Copy a file of a training into the folder of another program. Return False for a file or folder that is
        not offered. Raises UserError for a name that is taken there."""
        job = self.find_job(run_id)
        if job is None or name not in describe(job, "")["files"] or folder not in map(str, find_adapter_folders()):
            return False
        path = Path(folder) / name
        with Path(job.output).with_name(name).open("rb") as source:
            try:
                target = path.open("xb")
            except FileExistsError:
                raise of_file(path)("exists already and is kept", "rename one of the two files") from None
            try:  # from here on the file is ours
                with target:
                    shutil.copyfileobj(source, target)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        return True

    # --- the process of the queue ---

    def run(self) -> None:
        """Train what waits, in a process that outlives this one."""
        self.is_wanted = True
        if self.runner is not None and self.runner.poll() is None:
            return
        queue = self.store.queue
        command = [sys.executable, str(ROOT / "tools" / "run_queue.py"), "run", "--folder", str(queue.folder)]
        with (queue.logs / "runner.log").open("ab") as log:
            self.runner = subprocess.Popen(
                command, cwd=self.store.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **group_options()
            )

    def tend(self) -> bool:
        """Look after the queue; return True while a process trains what waits."""
        queue = self.store.queue
        if self.runner is not None and self.runner.poll() is None:
            return True
        running = queue.list_tickets("running")
        if any(claim.is_here and claim.runner.is_alive for ticket in running if (claim := ticket.claim) is not None):
            return True
        tend_orphans(queue)
        # A runner that ends when nothing waits may miss what is added at that moment.
        if self.is_wanted and queue.list_tickets("waiting"):
            self.run()
            return True
        self.is_wanted = False
        return False


def describe(job: Job, state: str) -> dict[str, Any]:
    """Return what is known of a job without the queue."""
    adapter = Path(job.output + WEIGHTS)
    files = adapter.parent.glob(f"{adapter.stem}*{WEIGHTS}") if adapter.parent.is_dir() else ()
    sheets = list_sheets(job)
    return {
        "id": id_of(job),
        "name": job.name,
        "state": state,
        "number": None,
        "step": read_step(job),
        "max_steps": None,
        "adapter": str(adapter) if state == "done" else None,
        "folder": str(adapter.parent),
        "files": sorted(path.name for path in files),
        "sheet": sheets[-1].parent.name if sheets else None,
        "has_report": Path(job.output + ENDING).is_file(),
        "is_stopping": False,
        "requests": [],
        "remark": "",
    }


@dataclass(frozen=True)
class End:
    """The state at the end of a finished run."""

    path: Path
    step: int


def read_end(job: Job) -> End | None:
    path = Path(f"{job.output}-state")
    with suppress(OSError, ValueError, KeyError):
        return End(path, int(parse_json((path / MANIFEST_FILE).read_bytes())["current_step"]))
    return None


def list_sheets(job: Job) -> list[Path]:
    """Return the images of a training's adapter at several strengths, the newest last."""
    paths = Path(job.output).parent.glob(f"{job.name}-strengths*/strengths.png")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def read_step(job: Job) -> int | None:
    """Return the step of a run's newest saved state, by its name; None without one."""
    steps = [int(match[1]) for path in job.list_states() if (match := STEP.search(path.name, len(job.name)))]
    return max(steps, default=None)


def list_gpu_programs(own_pids: frozenset[int]) -> list[str]:
    """Return the programs that use an NVIDIA GPU besides `own_pids`, with their memory; empty without one."""
    rows = ([cell.strip() for cell in line.split(",")] for line in read([*SMI]).splitlines())
    return [f"{Path(row[1]).name} ({row[2]})" for row in rows if len(row) == 3 and row[0].isdecimal()
            and int(row[0]) not in own_pids]  # fmt: skip
