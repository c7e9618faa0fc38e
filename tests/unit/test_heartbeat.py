"""Who is missed, what is said of it, and when a process is ended that does not end by itself."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from library.heartbeat import Heartbeat, Times, has_ended
from library.processes import Processes, ProcessLost
from tests.unit.test_processes import Board

HOST = socket.gethostname()
QUICK = Times(beat=0.01, silent=0.15, say=0.02, end=0.05)


def board(**processes: str) -> Board:
    """Return the entries of processes: host and number by rank."""
    return Board({f"process/{rank.removeprefix('_')}": process for rank, process in processes.items()})


def ended() -> str:
    """A process of this machine that is gone."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return f"{HOST} {done.pid}"


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_ended_is_missed_unless_it_said_that_it_is_done() -> None:
    said = board(_0=f"{HOST} {os.getpid()}", _1=ended(), _2=f"{HOST} {os.getpid()}")
    for rank in (0, 2):
        assert str(Heartbeat(said, rank, 3).find()).startswith("process 1 was killed without an error message")
    said["over/1"] = "1"
    assert Heartbeat(said, 0, 3).find() is None
    said["failure/1"] = "UserError: no image"
    assert Heartbeat(said, 0, 3).find() == "process 1 ended with an error: UserError: no image"


def test_asking_whether_a_process_lives_sends_it_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, signal 0 is Ctrl+C."""
    monkeypatch.delattr(os, "kill")
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: has_ended(f"{HOST} {zombie.pid}"))
    zombie.wait()
    assert has_ended(f"{HOST} {zombie.pid}")
    assert not has_ended(f"{HOST} {os.getpid()}") and not has_ended("elsewhere 1")


def test_a_process_of_another_machine_is_missed_once_it_is_silent() -> None:
    said = board(_0=f"{HOST} {os.getpid()}", _1="elsewhere 7")
    said["beat/1"] = "1"
    heart = Heartbeat(said, 0, 2, QUICK)
    assert heart.find() is None
    time.sleep(0.2)
    assert str(heart.find()).startswith("process 1 on elsewhere has sent nothing for")
    said["beat/1"] = "2"
    assert heart.find() is None


def test_what_the_main_process_finds_is_known_to_all() -> None:
    said = board(_0="elsewhere 5", _1=f"{HOST} {os.getpid()}", _2="elsewhere 9")
    said["lost"] = "process 2 ended with an error: no space"
    assert Heartbeat(said, 1, 3).find() == "process 2 ended with an error: no space"


class Gone(Board):
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_gone_is_the_main_process() -> None:
    assert "the main process or its machine is no longer reachable" in str(
        Heartbeat(Gone({"process/0": "elsewhere 5"}), 1, 2).find()
    )


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_process_that_does_not_end_by_itself_is_ended(is_stopping: bool, caplog: pytest.LogCaptureFixture) -> None:
    said, quits = board(_0=f"{HOST} {os.getpid()}", _1=ended()), list[int]()
    heart = Heartbeat(said, 0, 2, QUICK, is_stopping=is_stopping, quit=quits.append)
    heart.start()
    wait_until(lambda: heart.lost)
    if is_stopping:  # it saves, and may take its time
        time.sleep(0.3)
        assert not quits and "this process will end too" not in caplog.text
    else:
        wait_until(lambda: quits)
        assert quits == [1] and "process 1 was killed" in caplog.text and "this process will end too" in caplog.text
    assert said["lost"] == heart.lost


def test_one_that_is_done_misses_nobody() -> None:
    said, quits = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}"), list[int]()
    heart = Heartbeat(said, 1, 2, QUICK, quit=quits.append)
    heart.start()
    wait_until(lambda: "beat/1" in said)
    heart.stop()
    said["process/0"] = ended()
    time.sleep(0.2)
    assert heart.lost is None and not quits and said["over/1"] == "1"


def of_rank(rank: int, store: Board) -> Processes:
    return Processes(rank, 2, store=store, heartbeat=Heartbeat(store, rank, 2, QUICK))


def test_a_store_that_breaks_under_a_wait_is_told_as_the_end_of_who_had_it() -> None:
    """torch says it in one of many ways, and in one type."""
    torch_said = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    with pytest.raises(ProcessLost, match=r"the main process or its machine is no longer reachable.*got 0 bytes"):
        with of_rank(1, Gone({"process/0": "elsewhere 5"})).reporting_failures():
            raise torch.distributed.DistNetworkError(torch_said)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_stays_until_the_others_know_why_it_ends(rank: int) -> None:
    """It has the store, in which the reason stands; the others need not stay."""
    said = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}")
    timer = threading.Timer(0.4, said.__setitem__, ("over/1", "1"))
    timer.start()
    started = time.monotonic()
    with pytest.raises(ValueError, match="no image"):
        with of_rank(rank, said).reporting_failures():
            raise ValueError("no image")
    took = time.monotonic() - started
    timer.cancel()
    assert said[f"failure/{rank}"] == "ValueError: no image"
    assert 0.3 < took < 3 if rank == 0 else took < 0.3
