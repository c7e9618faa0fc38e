"""A queue of real trainings, by its own command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training.run_queue.folder import Queue
from library.training.run_queue.tickets import ProcessId, Ticket
from tests.running import ROOT
from tests.unit.training.queue_jobs import wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the test sends SIGKILL")


def run_tool(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "tools" / "run_queue.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def process_of(queue: Queue, number: int) -> ProcessId | None:
    ticket = queue.find_running(number)
    return None if ticket is None or ticket.claim is None else ticket.claim.process


def add_jobs(folder: Path, arguments: list[str], *names: str) -> Queue:
    """Add trainings that differ in their names alone, and delete the TOML file."""
    (folder / "trained here.toml").write_text("# train_network.py\nsave_state = true\nsave_every_n_steps = 1\n")
    for name in names:
        done = run_tool(folder, "add", "trained here.toml", "--", *arguments, "--output_name", name)
        assert done.wait() == 0, done.communicate()
    (folder / "trained here.toml").unlink()
    return Queue(folder / "output" / "queue")


def test_a_queue_of_three_trains_though_one_is_killed(base_arguments: list[str], tmp_path: Path) -> None:
    queue = add_jobs(tmp_path, [*base_arguments, "--max_train_steps", "12"], "first", "zweite Ü", "third")
    run = run_tool(tmp_path, "run")
    wait_until(lambda: (tmp_path / "out" / "zweite Ü-step00000003-state").is_dir() or run.poll() is not None)
    process = process_of(queue, 2)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    _, log = run.communicate()
    assert run.returncode == 0, log
    assert queue.list_tickets("done") == [Ticket(1), Ticket(2, losses=1), Ticket(3)]
    events = [json.loads(line) for line in (queue.logs / "000002.jsonl").read_text().splitlines()]
    first_steps = [event["first_step"] for event in events if event["event"] == "plan"]
    assert len(first_steps) == 2 and first_steps[0] == 0 and 3 <= first_steps[1] < 12
    files = [load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("first", "zweite Ü", "third")]
    assert all(torch.equal(files[0][key], other[key]) for other in files[1:] for key in files[0])
    listed, _ = run_tool(tmp_path, "list").communicate()
    assert listed.count("12/12") == 3 and "zweite Ü-report.html" not in listed, "base_arguments leave reports out"


@pytest.mark.nightly
def test_stop_saves_a_training_and_run_resumes_it(base_arguments: list[str], tmp_path: Path) -> None:
    queue = add_jobs(tmp_path, [*base_arguments, "--max_train_steps", "12"], "mine", "other")
    run = run_tool(tmp_path, "run")
    wait_until(lambda: (tmp_path / "out" / "mine-step00000002-state").is_dir() or run.poll() is not None)
    assert run_tool(tmp_path, "stop").wait() == 0
    _, log = run.communicate()
    assert run.returncode == 0 and queue.list_tickets("waiting") == [Ticket(1), Ticket(2)], log
    assert not (tmp_path / "out" / "mine.safetensors").exists()
    assert run_tool(tmp_path, "run").wait() == 0
    assert queue.list_tickets("done") == [Ticket(1), Ticket(2)]
    mine, other = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("mine", "other"))
    assert all(torch.equal(mine[key], other[key]) for key in mine)
