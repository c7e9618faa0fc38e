"""Runs of several processes that are forked from one process, which has imported everything, so a run costs no imports.

`python -m tests.ranks <jobs.json>` executes them in sequence. Each process gets the environment of torch's launcher and
its own output file in the job's folder; the backend is gloo.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.base.collector import keep_imported
from tests.killing import import_all, run_module

MOST_SECONDS = 120  # of one run


@dataclass(frozen=True)
class Job:
    """One run: its command line, number of processes and environment.

    With `call` ("module:function"), that function is called with the arguments instead of a script.
    """

    arguments: list[str]
    count: int
    folder: str  # for their output
    script: str = "train_network"
    environment: dict[str, str] = field(default_factory=dict)
    call: str | None = None
    killed: int | None = None  # rank that gets SIGKILL when rank `killer` first calls the function `killed_at`
    killer: int = 0
    killed_at: str = ""  # "module:function"


@dataclass(frozen=True)
class Rank:
    """The result of one process. `status` is an exit code, or -9 after SIGKILL."""

    status: int
    said: str
    gave: Any = None  # the function's result, from JSON


def run_ranks(jobs: Sequence[Job], folder: Path, timeout: float = 300) -> list[list[Rank]]:
    """Run the jobs. Return the results of each job's processes, ordered by rank."""
    return [[Rank(**rank) for rank in ranks] for ranks in run_module("tests.ranks", jobs, folder, timeout)]


# In the forking process


def main() -> None:
    """Run the jobs of a file and print their results as JSON."""
    from tests.running import STARTED

    jobs = [Job(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    for script in {job.script for job in jobs if job.call is None}:
        import_all(script, STARTED[script])
    for call in {job.call for job in jobs if job.call is not None}:
        importlib.import_module(call.partition(":")[0])
    keep_imported("tests")
    print(json.dumps([[asdict(rank) for rank in run_forked(job)] for job in jobs]))


def run_forked(job: Job) -> list[Rank]:
    """Run one job in child processes."""
    port = free_port()
    ranks = range(job.count)
    children = {fork(job, rank, port): rank for rank in ranks}
    statuses: dict[int, int] = {}
    end = time.monotonic() + MOST_SECONDS
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
            continue
        time.sleep(0.02)
        if time.monotonic() > end:  # deadlock
            for child in children:
                os.kill(child, signal.SIGKILL)
    return [
        Rank(statuses[rank], output_file(job, rank).read_text(errors="replace"), result_file(job, rank))
        for rank in ranks
    ]


def output_file(job: Job, rank: int) -> Path:
    return Path(job.folder) / f"said_{rank}"


def result_file(job: Job, rank: int) -> Any:
    path = Path(job.folder) / f"gave_{rank}"
    return json.loads(path.read_text()) if path.exists() else None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def fork(job: Job, rank: int, port: int) -> int:
    """Start one process; return its process id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        output = os.open(output_file(job, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.count, "LOCAL_WORLD_SIZE": job.count}
        os.environ.update({name: str(value) for name, value in environment.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        os.environ.update(job.environment)
        (Path(job.folder) / f"number_{rank}").write_text(str(os.getpid()))
        if job.killed is not None and rank == job.killer:
            watch(job)
        status = start(job) if job.call is None else call(job, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch(job: Job) -> None:
    """Kill another process when this one first calls the function that the job names."""
    module, _, name = job.killed_at.partition(":")
    home = importlib.import_module(module)
    plain = getattr(home, name)

    def kills(*arguments: Any, **keywords: Any) -> Any:
        path = Path(job.folder) / f"number_{job.killed}"
        number = path.read_text()
        if number:
            path.write_text("")
            os.kill(int(number), signal.SIGKILL)
        return plain(*arguments, **keywords)

    setattr(home, name, kills)


def start(job: Job) -> int:
    """Run the script as its own file does."""
    from library.training.command_line.main import main as train
    from tests.running import STARTED

    spec = STARTED[job.script]
    parser = importlib.import_module(job.script).setup_parser()
    return train(parser, spec.options, spec.build, job.arguments)


def call(job: Job, rank: int) -> int:
    """Call the function in all processes and store its result."""
    import torch.distributed as dist

    assert job.call is not None
    module, _, name = job.call.partition(":")
    dist.init_process_group("gloo")
    function = getattr(importlib.import_module(module), name)(*job.arguments)
    (Path(job.folder) / f"gave_{rank}").write_text(json.dumps(function))
    if dist.is_initialized():  # a script's run destroys it itself
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    main()
