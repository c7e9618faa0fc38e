"""Runs of a script that are killed at a chosen file operation.

`python -m tests.killing <jobs.json>` imports everything once and forks for each run. A run therefore costs no imports
and no garbage collection over them, which would also copy their memory. Each run counts its file operations: opening
for writing, renaming, replacing, removing, creating a folder, and writing by the safetensors library, which happens
outside Python. It gets SIGKILL before the chosen operation; a safetensors file can also be left half written. Times and
session ids are fixed, so that whole folders can be compared.
"""

import builtins
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from library.base.collector import keep_imported
from library.checkpoints.base_model_spec import BaseModelSpec
from tests.running import ROOT

FRONT_DOOR = "train"  # train.py, which calls the scripts
WRITES = set("wax+")
NOW = 1_800_000_000.0


@dataclass(frozen=True)
class Job:
    """One run: its command line, its working folder, and the operation at which it dies; None lets it finish."""

    arguments: list[str]
    folder: str
    script: str = "train_network"
    dies_at: int | None = None  # index of the operation
    leaves_half: bool = False  # leave the safetensors file of that operation half written


@dataclass(frozen=True)
class Ended:
    """The result of a job. `status` is an exit code, or -9 after SIGKILL."""

    status: int
    operations: list[str]  # kind and file name of each
    output: str


def run_jobs(jobs: Sequence[Job], folder: Path, timeout: float = 600) -> list[Ended]:
    """Run the jobs in sequence, forked from one process that has imported everything."""
    return [Ended(**fields) for fields in run_module("tests.killing", jobs, folder, timeout)]


def run_module(module: str, jobs: Sequence[Any], folder: Path, timeout: float) -> Any:
    """Run `module` as a program on a list of dataclasses; return its standard output as parsed JSON."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, str(path)], cwd=ROOT, env=environment, capture_output=True, timeout=timeout,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# In the forking process


def main() -> None:
    """Run the jobs of a file and print their results as JSON."""
    from tests.running import STARTED

    jobs = [Job(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    for script in {job.script for job in jobs}:
        import_all(script, STARTED.get(script, STARTED["train_network"]))
    fix_times()
    keep_imported("tests")
    print(json.dumps([asdict(run_forked(job)) for job in jobs]))


def import_all(script: str, spec: BaseModelSpec) -> None:
    """Import everything that a run imports, so that no fork has to."""
    import importlib

    names = (script, spec.build.__module__, "networks.lora", "diffusers", "cv2")
    late = (
        "library.training.loop.loop",
        "library.training.run.prepare",
        "library.data.debug_dataset",
        "transformers.optimization",
    )
    for name in (*names, *late, "accelerate", "safetensors.torch", "diffusers.optimization", "torch.utils.data"):
        importlib.import_module(name)


def fix_times() -> None:
    """Fix the times and session ids that get into files."""
    from library.training.reporting import sample_images
    from library.training.run import writer
    from library.training.saving import checkpoints

    still: Any = SimpleNamespace(time=lambda: NOW, strftime=lambda form: "20270115080000")
    for module in (sample_images, checkpoints, writer):
        module.time = still  # type: ignore[attr-defined]
    writer.secrets = SimpleNamespace(randbelow=lambda limit: 7)  # type: ignore[attr-defined]


def run_forked(job: Job) -> Ended:
    """Run one job in a child process."""
    folder = Path(job.folder)
    log, record = folder / "log", folder / "operations"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        status = 70
        try:
            with Path(record).open("w") as file:
                watch(job, lambda line: (file.write(line + "\n"), file.flush()))
                status = start(job)
        finally:
            os._exit(status)
    _, raw = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(raw), record.read_text().splitlines(), log.read_text(errors="replace"))


def start(job: Job) -> int:
    """Run the script as its own file does."""
    import importlib

    from library.training.command_line.main import main as train
    from tests.running import STARTED

    if job.script == FRONT_DOOR:
        return int(importlib.import_module(FRONT_DOOR).main(job.arguments))
    spec = STARTED[job.script]
    parser = importlib.import_module(job.script).setup_parser()
    return train(parser, spec.options, spec.build, job.arguments)


def watch(job: Job, note: Callable[[str], object]) -> None:
    """Count this process's file operations, and kill it at the one that the job names."""
    import safetensors.torch

    count = 0

    def dies_now(kind: str, path: Any) -> bool:
        nonlocal count
        count += 1
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        note(f"{kind} {os.path.basename(name)}")
        return count - 1 == job.dies_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(kind: str, plain: Callable[..., Any], is_counted: Callable[..., bool]) -> Callable[..., Any]:
        def operation(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if is_counted(path, *arguments, **keywords) and dies_now(kind, path):
                die()
            return plain(path, *arguments, **keywords)

        return operation

    def always(path: Any, *arguments: Any, **keywords: Any) -> bool:
        return True

    def opens_to_write(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> bool:
        return bool(WRITES & set(mode)) and not isinstance(path, int) and not os.fspath(path).startswith("/dev/")

    for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
        setattr(os, name, watched(name, getattr(os, name), always))
    builtins.open = io.open = watched("open", io.open, opens_to_write)  # type: ignore[assignment]

    save_file = safetensors.torch.save_file

    def save(tensors: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        dies = dies_now("save", path)
        if dies and not job.leaves_half:
            die()
        save_file(tensors, path, *arguments, **keywords)
        if dies:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    safetensors.torch.save_file = save


if __name__ == "__main__":
    main()
