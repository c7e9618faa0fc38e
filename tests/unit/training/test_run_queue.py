"""A queue of trainings: every job runs once at a time, whatever is killed, and none is lost."""

import errno
import json
import logging
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from library.architectures.scripts import list_scripts
from library.base.errors import UserError
from library.training.run_queue import folder as folder_module
from library.training.run_queue import tending, trainings
from library.training.run_queue.adding import make_job
from library.training.run_queue.folder import Queue
from library.training.run_queue.jobs import Job
from library.training.run_queue.progress import format_queue
from library.training.run_queue.runner import Runner, run_queue
from library.training.run_queue.stopping import remove_job, stop_queue
from library.training.run_queue.tending import tend_orphans
from library.training.run_queue.tickets import Claim, ProcessId, Ticket
from library.training.saving.state import NETWORK_FILE, TENSOR_FILE, save_state
from library.training.saving.state_names import MANIFEST_FILE
from tests.running import ROOT
from tests.tiers import first_is_fast
from tests.unit.training.queue_jobs import StandIns, wait_until
from tools.run_queue import list_script_names, read_script

DEAD = ProcessId(2**22 + 1, "0.1")  # above the highest ID on Linux


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[StandIns]:
    stand_ins = StandIns(tmp_path)
    yield stand_ins
    for ticket in stand_ins.queue.list_tickets("running"):  # of a test that failed
        if ticket.claim is not None and ticket.claim.process is not None:
            trainings.kill(ticket.claim.process)


def work_until_waiting(jobs: StandIns, name: str) -> Runner:
    """Run jobs in this process until one of them waits for a signal."""
    runner = Runner(jobs.queue, [""], jobs.folder)
    wait_until(lambda: runner.work() and jobs.waits(name))
    return runner


def finish(runner: Runner) -> None:
    wait_until(lambda: not runner.work())


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_job_killed_in_the_middle_resumes_before_the_next(jobs: StandIns) -> None:
    tickets = [jobs.add("first"), jobs.add("second", "waits"), jobs.add("third")]
    runner = work_until_waiting(jobs, "second")
    os.kill(jobs.process_of(tickets[1]).pid, signal.SIGKILL)
    finish(runner)
    assert jobs.numbers() == {"done": [1, 2, 3]} and runner.num_failed == 0
    assert jobs.notes_of("second") == ["started", "started", "done"]
    times = [(jobs.folder / f"{name}.txt").stat().st_mtime_ns for name in ("first", "second", "third")]
    assert times == sorted(times)
    assert [ticket.losses for ticket in jobs.queue.list_tickets("done")] == [0, 1, 0]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_job_fails_after_its_process_was_killed_three_times(jobs: StandIns) -> None:
    ticket = jobs.add("mine", "waits")
    for number in range(3):
        (jobs.folder / "mine.txt").unlink(missing_ok=True)
        (jobs.folder / "mine.waits").unlink(missing_ok=True)
        runner = work_until_waiting(jobs, "mine")
        os.kill(jobs.process_of(ticket).pid, signal.SIGKILL)
        wait_until(lambda runner=runner: not runner.tend())  # type: ignore[misc]
        assert jobs.numbers() == ({"waiting": [1]} if number < 2 else {"failed": [1]})


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_failing_job_keeps_its_last_lines_and_the_next_one_trains(jobs: StandIns) -> None:
    ticket = jobs.add("mine", "fails")
    jobs.add("other")
    assert run_queue(jobs.queue, [""], jobs.folder) == 1
    assert jobs.numbers() == {"done": [2], "failed": [1]}
    assert jobs.notes_of("mine") == ["started"], "it would fail again"
    lines = jobs.queue.last_lines_of(ticket).read_text().splitlines()
    assert lines == [f"line {number}" for number in range(10, 30)]
    assert any(line.startswith("1    failed") and line.endswith("line 29") for line in format_queue(jobs.queue))


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_job_trains_with_the_toml_file_as_it_was(jobs: StandIns) -> None:
    jobs.add("mine", "config")
    run_queue(jobs.queue, [""], jobs.folder)
    assert jobs.notes_of("mine") == ["started", "seed = 1", "done"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_each_gpu_trains_one_job(jobs: StandIns) -> None:
    for name in ("a", "b", "c"):
        jobs.add(name, "gpu", "waits")
    runner = Runner(jobs.queue, ["0", "GPU-1f"], jobs.folder)
    wait_until(lambda: runner.work() and jobs.waits("a") and jobs.waits("b"))
    assert jobs.numbers() == {"running": [1, 2], "waiting": [3]}
    for name in ("a", "b", "c"):
        (jobs.folder / f"{name}.goes").touch()
    finish(runner)
    assert {jobs.notes_of(name)[1] for name in ("a", "b")} == {"0", "GPU-1f"}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_gpu_stays_taken_while_the_file_of_its_job_is_renamed(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    jobs.add("other")
    runner = work_until_waiting(jobs, "mine")
    running = jobs.queue.path("running", jobs.queue.list_tickets("running")[0])
    running.rename(running.with_suffix(".hidden"))
    assert runner.work() and jobs.numbers() == {"waiting": [2]}
    running.with_suffix(".hidden").rename(running)
    (jobs.folder / "mine.goes").touch()
    finish(runner)
    assert jobs.numbers() == {"done": [1, 2]}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_second_run_on_the_same_gpu_is_refused(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    run = jobs.start_run("0")
    wait_until(lambda: jobs.waits("mine"))
    try:
        with pytest.raises(UserError, match=rf"on GPU 0 .process {run.pid} on .*--gpus"):
            run_queue(jobs.queue, ["0"], jobs.folder)
        assert run_queue(jobs.queue, ["1"], jobs.folder) == 0
    finally:
        (jobs.folder / "mine.goes").touch()
        assert run.wait() == 0


# Stopping


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_stopped_job_saves_and_resumes_in_the_next_run(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    jobs.add("other")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    threads = [threading.Thread(target=stop_queue, args=(jobs.queue, False)) for _ in range(2)]  # as two terminals do
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.wait() == 0
    assert jobs.numbers() == {"waiting": [1, 2]} and jobs.notes_of("mine") == ["started", "saved"]
    assert jobs.queue.list_tickets("waiting")[0].losses == 0
    assert run_queue(jobs.queue, [""], jobs.folder) == 0, "the stop was for the run before"
    assert jobs.notes_of("mine") == ["started", "saved", "started", "done"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_signal_to_the_run_saves_and_ends_with_its_status(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert jobs.numbers() == {"waiting": [1]} and jobs.notes_of("mine") == ["started", "saved"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_stop_now_ends_a_training_that_ignores_sigterm(jobs: StandIns) -> None:
    jobs.add("mine", "waits", "deaf")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    jobs.queue.request(jobs.queue.list_tickets("running")[0], "stop")
    wait_until(lambda: any((jobs.queue.folder / "requests").glob("*.signalled")))
    assert jobs.numbers() == {"running": [1]}
    stop_queue(jobs.queue, now=True)
    assert run.wait() == 0 and jobs.numbers() == {"waiting": [1]}
    assert not list((jobs.queue.folder / "requests").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_training_gets_one_signal_however_often_it_is_asked_for(
    jobs: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one would end it without saving."""
    signals: list[ProcessId] = []
    monkeypatch.setattr(tending, "interrupt", signals.append)
    claim = Claim("host", DEAD, ProcessId.current(), "")
    for _ in range(2):
        jobs.queue.request(Ticket(1, 0, claim), "stop")
        tending.forward_requests(jobs.queue, Ticket(1, 0, claim))
    tending.forward_requests(jobs.queue, Ticket(2, 0, claim))
    assert signals == [ProcessId.current()]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_training_is_asked_to_save_as_its_system_does(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    trainings.interrupt(ProcessId.current(), platform)
    trainings.interrupt(DEAD, platform)
    trainings.interrupt(replace(ProcessId.current(), start="0.1"), platform)  # another process of that ID
    assert sent == [(os.getpid(), 1 if platform == "win32" else signal.SIGTERM)]  # 1: CTRL_BREAK_EVENT
    # Ctrl-Break reaches a process group, so the training has its own.
    options = {"win32": {"creationflags": 0x200}, "linux": {"start_new_session": True}}
    assert trainings.group_options(platform) == options[platform]


# Removing


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_running_job_saves_before_it_is_removed(jobs: StandIns) -> None:
    ticket = jobs.add("mine", "waits")
    jobs.add("other")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    remove_job(jobs.queue, 1, now=False)
    assert run.wait() == 0
    assert jobs.numbers() == {"done": [2]} and jobs.notes_of("mine") == ["started", "saved"]
    assert not jobs.queue.log_of(ticket).exists()


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize("state", ["waiting", "done"])
def test_a_job_that_does_not_run_is_removed(jobs: StandIns, state: str) -> None:
    jobs.add("mine")
    if state == "done":
        run_queue(jobs.queue, [""], jobs.folder)
    remove_job(jobs.queue, 1, now=False)
    assert jobs.numbers() == {} and not list(jobs.queue.logs.iterdir())
    with pytest.raises(UserError, match="there is no job 1"):
        remove_job(jobs.queue, 1, now=False)


# Killed queues


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_training_outlives_its_killed_queue_and_is_not_started_again(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    jobs.add("other")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    run.kill()
    run.wait()
    runner = Runner(jobs.queue, [""], jobs.folder)
    assert runner.work() and jobs.numbers() == {"running": [1], "waiting": [2]}, "its GPU is taken"
    (jobs.folder / "mine.goes").touch()
    finish(runner)
    assert jobs.numbers() == {"done": [1, 2]} and jobs.notes_of("mine") == ["started", "done"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_stop_saves_a_training_whose_queue_was_killed(jobs: StandIns) -> None:
    jobs.add("mine", "waits")
    run = jobs.start_run()
    wait_until(lambda: jobs.waits("mine"))
    run.kill()
    run.wait()
    stop_queue(jobs.queue, now=False)
    assert jobs.numbers() == {"waiting": [1]} and jobs.notes_of("mine") == ["started", "saved"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize(
    ("process", "status", "state"),
    [(DEAD, None, "waiting"), (None, None, "waiting"), (DEAD, 0, "done"), (DEAD, 1, "failed"), (DEAD, 143, "waiting")],
)
def test_jobs_of_a_killed_queue_go_where_their_trainings_ended(
    jobs: StandIns, process: ProcessId | None, status: int | None, state: str
) -> None:
    ticket = jobs.add("mine")
    claimed = jobs.queue.claim(ticket, Claim(socket.gethostname().partition(".")[0], DEAD, process, "0", status))
    assert claimed is not None
    assert tend_orphans(jobs.queue) == [] and jobs.numbers() == {state: [1]}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_process_id_that_the_system_used_again_is_another_process(jobs: StandIns) -> None:
    mine = ProcessId.current()
    assert mine.is_alive and not replace(mine, start="0.1").is_alive
    claim = Claim(socket.gethostname().partition(".")[0], DEAD, replace(mine, start="0.1"), "")
    assert jobs.queue.claim(jobs.add("mine"), claim) is not None
    tend_orphans(jobs.queue)
    assert jobs.numbers() == {"waiting": [1]}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_process_that_was_not_waited_for_has_ended() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not ProcessId(process.pid, ProcessId.current().start).is_alive
    process.wait()


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_jobs_of_another_machine_are_left_alone(jobs: StandIns) -> None:
    claimed = jobs.queue.claim(jobs.add("mine"), Claim("elsewhere", DEAD, DEAD, ""))
    assert claimed is not None
    assert run_queue(jobs.queue, [""], jobs.folder) == 0
    assert jobs.queue.list_tickets("running") == [claimed]
    assert any("on elsewhere" in line for line in format_queue(jobs.queue))
    remove_job(jobs.queue, 1, now=True)
    assert jobs.numbers() == {}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_training_whose_job_was_taken_back_ends_before_it_trains(jobs: StandIns) -> None:
    ticket = jobs.add("mine")
    claimed = jobs.queue.claim(ticket, Claim("here", ProcessId.current(), None, ""))
    assert claimed is not None
    job = jobs.queue.read_job("running", claimed)
    tending.release_claim(jobs.queue, claimed)
    assert job is not None and trainings.start_training(jobs.queue, claimed, job, jobs.folder).wait() == 0
    assert jobs.notes_of("mine") == [] and jobs.numbers() == {"waiting": [1]}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize("num_jobs", first_is_fast([8, 200]))
def test_no_job_runs_twice_at_a_time_though_queues_and_trainings_are_killed(jobs: StandIns, num_jobs: int) -> None:
    names = [f"job{number}" for number in range(1, num_jobs + 1)]
    for name in names:
        jobs.add(name)
    runs, chance, num_kills, due = {slot: jobs.start_run(slot) for slot in "0123"}, random.Random(3), 0, 2

    def is_over() -> bool:
        nonlocal num_kills, due
        states = jobs.numbers()
        if len(states.get("done", ())) >= due:
            due += num_jobs // 8
            slot = chance.choice("0123")
            if chance.random() < 0.5:
                runs[slot].kill()
            elif trained := [t.claim.process for t in jobs.queue.list_tickets("running") if t.claim]:
                for process in trained[:1]:
                    if process is not None:
                        trainings.kill(process)
            num_kills += 1
        for slot, run in runs.items():
            if run.poll() is not None and ("waiting" in states or "running" in states):
                assert run.stderr is not None
                run.stderr.close()
                runs[slot] = jobs.start_run(slot)
        return "waiting" not in states and "running" not in states

    wait_until(is_over)
    for run in runs.values():
        run.communicate()
    assert num_kills >= 6
    assert jobs.numbers() == {"done": list(range(1, num_jobs + 1))}
    assert [name for name in names if (jobs.folder / f"{name}.overlaps").exists()] == []
    assert [name for name in names if jobs.notes_of(name)[-1] != "done"] == []


# Trouble with the folder


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_full_disk_ends_the_run_and_no_job_fails(jobs: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.add("mine")

    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(trainings, "write_whole", fail)
    with pytest.raises(OSError, match="No space left"):
        run_queue(jobs.queue, [""], jobs.folder)
    assert jobs.numbers() == {"waiting": [1]}


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_job_that_cannot_be_moved_is_moved_later(
    jobs: StandIns, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.add("mine")
    rename, refused = os.rename, list[str]()

    def fail_at_first(source: Path, target: Path) -> None:
        if Path(target).parent.name == "done" and len(refused) < 3:
            refused.append(str(target))
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_at_first)
    assert run_queue(jobs.queue, [""], jobs.folder) == 0
    assert jobs.numbers() == {"done": [1]} and len(refused) == 3
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_missing_working_folder_fails_its_job_alone(jobs: StandIns) -> None:
    ticket = jobs.add("mine")
    path = jobs.queue.path("waiting", ticket)
    path.write_text(path.read_text().replace(f'"folder": "{jobs.folder}"', f'"folder": "{jobs.folder}/gone"'))
    jobs.add("other")
    assert run_queue(jobs.queue, [""], jobs.folder) == 1
    assert jobs.numbers() == {"done": [2], "failed": [1]}
    assert "gone" in jobs.queue.last_lines_of(ticket).read_text()


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize("text", ["", "{}", "[1]", "\xff", '{"queue": 2}', "script"])
def test_a_file_that_is_no_job_is_neither_run_nor_touched(jobs: StandIns, text: str) -> None:
    path = jobs.queue.path("waiting", jobs.add("mine"))
    # A job may name no program elsewhere.
    text = path.read_text().replace("stand_in.py", "../stand_in.py") if text == "script" else text
    path.write_text(text, encoding="latin-1")
    jobs.add("other")
    assert run_queue(jobs.queue, [""], jobs.folder) == 0
    assert jobs.numbers() == {"waiting": [1], "done": [2]} and path.read_text(encoding="latin-1") == text
    assert any("unreadable" in line for line in format_queue(jobs.queue))


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_a_folder_with_other_files_is_no_queue(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match=r"--folder .* holds other files"):
        Queue(tmp_path).create()
    with pytest.raises(UserError, match=r"--folder .* is no queue"):
        Queue(tmp_path).require()
    with pytest.raises(UserError, match=r"--folder .* cannot be written"):
        Queue(tmp_path / "photo.png" / "queue").create()
    assert os.listdir(tmp_path) == ["photo.png"]


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_the_folder_is_its_owners_alone(jobs: StandIns) -> None:
    assert jobs.queue.folder.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_two_jobs_may_not_write_the_same_files(jobs: StandIns) -> None:
    jobs.add("mine")
    with pytest.raises(UserError, match=r"job 1 .given.toml. writes .*mine too; use another --output_name"):
        jobs.add("mine")
    run_queue(jobs.queue, [""], jobs.folder)
    assert jobs.add("mine").number == 2


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_jobs_added_at_the_same_time_get_different_numbers(jobs: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks do not hold between threads, so the others are shown as another process's."""
    attempts: list[Path] = []
    acquire = folder_module.acquire

    def acquire_late(path: Path, *words: str) -> object:
        attempts.append(path)
        if len(attempts) < 3:
            raise folder_module.Locked("held")
        return acquire(path, *words)

    monkeypatch.setattr(folder_module, "acquire", acquire_late)
    assert [jobs.add(name).number for name in ("a", "b")] == [1, 2] and len(attempts) == 4


# Names


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize(
    "ticket",
    [
        Ticket(1),
        Ticket(1234567, 2),
        Ticket(3, 1, Claim("my-pc", ProcessId(12, "ab.34"), None, "")),
        Ticket(3, 0, Claim("Büro @1/x", ProcessId(12, "1.5"), ProcessId(13, "1-6"), "GPU-8f/é", 143)),
    ],
)
def test_a_file_name_holds_the_whole_state_of_a_job(ticket: Ticket) -> None:
    assert Ticket.parse(ticket.file_name) == ticket
    assert not {*ticket.file_name} & {*'/\\:*?"<>| '}, "Windows takes it too"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
@pytest.mark.parametrize("name", ["queue.txt", "1.json", "000001.json.tmp", ".000001.json.12", "000001@a.json"])
def test_other_names_are_no_jobs(name: str) -> None:
    assert Ticket.parse(name) is None


# A job that begins with --resume goes on from its own state once it has one.

NOW = 1_800_000_000.0
SCRIPT, TOY = "train_network.py", ROOT / "configs" / "quickstart" / "toy_base"
DATASET = ROOT / "configs" / "quickstart" / "dataset.toml"


def make_state(job: Job, ending: str, seconds: float) -> Path:
    """Save a state, as if it were some seconds after the job was added."""
    path = Path(f"{job.output}{ending}")
    save_state(
        path, step=1, epoch=1, seed=0, num_processes=1, options={}, dataset={}, network=nn.Linear(1, 1), keepers={}
    )
    os.utime(path / MANIFEST_FILE, (NOW + seconds, NOW + seconds))
    return path


def job_in(folder: Path, since: float | None = NOW) -> Job:
    return Job("x.py", "x.toml", "", ("--resume", "/x"), str(folder), str(folder / "out" / "cat"), None, since)


def test_a_job_goes_on_from_the_state_that_it_saved_itself(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert job.find_own_state() is None  # so it begins with its --resume
    make_state(replace(job, output=f"{job.output}-2"), "-state", 5)  # of another run
    (tmp_path / "out" / "cat-step00000300-state").mkdir()  # not whole
    assert job.find_own_state() is None
    own = make_state(job, "-step00000020-timed-state", 10)
    assert job.find_own_state() == own
    assert job_in(tmp_path, None).find_own_state() is None  # --autoresume alone has always done so


def test_a_farther_state_of_an_earlier_run_is_not_taken_for_its_own(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    make_state(job, "-step00000200-state", -10)
    assert job.find_own_state() is None
    own = make_state(job, "-step00000120-state", 10)
    assert job.find_own_state() == own


@pytest.mark.parametrize("file", [MANIFEST_FILE, NETWORK_FILE, TENSOR_FILE])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, file: str) -> None:
    job = job_in(tmp_path)
    first, second = make_state(job, "-step00000120-state", 10), make_state(job, "-step00000140-state", 20)
    for state, found in ((second, first), (first, None)):  # at last the one that the job began with
        content = bytearray((state / file).read_bytes())
        content[-2] ^= 1
        modified = (state / file).stat().st_mtime
        (state / file).write_bytes(content)
        os.utime(state / file, (modified, modified))
        assert job.find_own_state() == found


def test_jobs_keep_when_they_were_added_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    path, job = tmp_path / "job.json", job_in(tmp_path)
    path.write_text(job.as_text())
    assert Job.read(path) == job
    path.write_text(job.as_text().replace(f',\n "since": {NOW}', ""))
    assert Job.read(path) == replace(job, since=None)
    path.write_text(job.as_text().replace(str(NOW), '"x"'))
    with pytest.raises(UserError, match="is no job of this version's queue"):
        Job.read(path)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in handles signals of POSIX")
def test_the_queue_starts_the_training_from_its_own_state(tmp_path: Path) -> None:
    jobs = StandIns(tmp_path)
    (jobs.folder / "stand_in.py").write_text(
        "import json, sys; open(sys.argv[3] + '/words.json', 'w').write(json.dumps(sys.argv))"
    )
    path = jobs.queue.path("waiting", jobs.add("mine", "--resume", "/x"))
    job = replace(Job.read(path), since=NOW)
    path.write_text(job.as_text())
    make_state(job, "-step00000200-state", -10)
    own = make_state(job, "-step00000007-state", 10)
    assert run_queue(jobs.queue, [""], jobs.folder) == 0
    words = json.loads((jobs.folder / "words.json").read_text())
    assert [words[n + 1] for n, word in enumerate(words) if word == "--resume"] == ["/x", str(own)]


@pytest.mark.parametrize("words", [[], ["--resume", "STATE"]])
def test_a_job_is_added_with_the_time_if_it_begins_with_a_state(tmp_path: Path, words: list[str]) -> None:
    state = tmp_path / "before-state"
    state.mkdir()
    (tmp_path / "mine.toml").write_text(
        f'pretrained_model_name_or_path = "{TOY}"\ndataset_config = "{DATASET}"\nnetwork_module = "networks.lora"\n'
        f'output_dir = "{tmp_path}"\noutput_name = "mine"\n'
    )
    given = [word.replace("STATE", str(state)) for word in words]
    scripts = list_scripts()
    job = make_job(tmp_path / "mine.toml", SCRIPT, given, list_script_names(scripts), partial(read_script, scripts))
    assert (job.since is not None) == bool(words)
