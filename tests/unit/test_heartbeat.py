"""Reporting missing processes, and terminating processes that do not exit by themselves."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from library.processes.heartbeat import Heartbeat, Times, has_ended
from library.processes.process_group import Processes, ProcessLost
from library.training.failures.interruption import Interrupted
from tests.unit.test_processes import Board

HOST = socket.gethostname()
QUICK = Times(beat=0.01, silent=0.15, say=0.02, end=0.05)


def board(**processes: str) -> Board:
    """Return the entries of processes: host and number by rank."""
    return Board({f"process/{rank.removeprefix('_')}": process for rank, process in processes.items()})


def entry_of_ended_process() -> str:
    """Return the board entry of a process on this machine that has exited."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return f"{HOST} {done.pid}"


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_exited_without_deregistering_is_reported_missing() -> None:
    store = board(_0=f"{HOST} {os.getpid()}", _1=entry_of_ended_process(), _2=f"{HOST} {os.getpid()}")
    for rank in (0, 2):
        assert str(Heartbeat(store, rank, 3).find()).startswith("process 1 was killed without an error message")
    store["over/1"] = "1"
    assert Heartbeat(store, 0, 3).find() is None
    store["failure/1"] = "UserError: no image"
    assert Heartbeat(store, 0, 3).find() == "process 1 ended with an error: UserError: no image"


def test_checking_whether_a_process_is_alive_sends_it_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, signal 0 is Ctrl+C."""
    monkeypatch.delattr(os, "kill")
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: has_ended(f"{HOST} {zombie.pid}"))
    zombie.wait()
    assert has_ended(f"{HOST} {zombie.pid}")
    assert not has_ended(f"{HOST} {os.getpid()}") and not has_ended("elsewhere 1")


def test_a_process_on_another_machine_is_missing_once_its_heartbeat_stops() -> None:
    store = board(_0=f"{HOST} {os.getpid()}", _1="elsewhere 7")
    store["beat/1"] = "1"
    heart = Heartbeat(store, 0, 2, QUICK)
    assert heart.find() is None
    time.sleep(0.2)
    assert str(heart.find()).startswith("process 1 on elsewhere has sent nothing for")
    store["beat/1"] = "2"
    assert heart.find() is None


def test_processes_that_rank_0_reports_missing_are_known_to_all_ranks() -> None:
    store = board(_0="elsewhere 5", _1=f"{HOST} {os.getpid()}", _2="elsewhere 9")
    store["lost"] = "process 2 ended with an error: no space"
    assert Heartbeat(store, 1, 3).find() == "process 2 ended with an error: no space"


class Gone(Board):
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_an_unreachable_store_means_that_rank_0_is_missing() -> None:
    assert "the main process or its machine is no longer reachable" in str(
        Heartbeat(Gone({"process/0": "elsewhere 5"}), 1, 2).find()
    )


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_process_that_does_not_exit_by_itself_is_terminated(
    is_stopping: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, quits = board(_0=f"{HOST} {os.getpid()}", _1=entry_of_ended_process()), list[int]()
    heart = Heartbeat(store, 0, 2, QUICK, is_stopping=is_stopping, quit=quits.append)
    heart.start()
    wait_until(lambda: heart.lost)
    if is_stopping:  # it saves, and may take its time
        time.sleep(0.3)
        assert not quits and "this process will end too" not in caplog.text
    else:
        wait_until(lambda: quits)
        assert quits == [1] and "process 1 was killed" in caplog.text and "this process will end too" in caplog.text
    assert store["lost"] == heart.lost


def test_a_process_that_is_done_reports_nobody_missing() -> None:
    store, quits = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}"), list[int]()
    heart = Heartbeat(store, 1, 2, QUICK, quit=quits.append)
    heart.start()
    wait_until(lambda: "beat/1" in store)
    heart.stop()
    store["process/0"] = entry_of_ended_process()
    time.sleep(0.2)
    assert heart.lost is None and not quits and store["over/1"] == "1"


def of_rank(rank: int, store: Board) -> Processes:
    return Processes(rank, 2, store=store, heartbeat=Heartbeat(store, rank, 2, QUICK))


def test_a_store_lost_during_a_wait_is_reported_as_the_end_of_rank_0() -> None:
    """torch has many messages for this but one exception type."""
    torch_messages = (
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    )
    with pytest.raises(ProcessLost, match=r"the main process or its machine is no longer reachable.*got 0 bytes"):
        with of_rank(1, Gone({"process/0": "elsewhere 5"})).reporting_failures():
            raise torch.distributed.DistNetworkError(torch_messages)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_waits_until_the_other_ranks_have_read_why_it_ends(rank: int) -> None:
    """Rank 0 hosts the store that holds the reason; the other ranks need not wait."""
    store = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}")
    timer = threading.Timer(0.4, store.__setitem__, ("over/1", "1"))
    timer.start()
    started = time.monotonic()
    with pytest.raises(ValueError, match="no image"):
        with of_rank(rank, store).reporting_failures():
            raise ValueError("no image")
    took = time.monotonic() - started
    timer.cancel()
    assert store[f"failure/{rank}"] == "ValueError: no image"
    assert 0.3 < took < 3 if rank == 0 else took < 0.3


def test_rank_0_waits_at_its_end_for_ranks_that_still_read_from_its_store() -> None:
    store = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}")
    timer = threading.Timer(0.2, store.__setitem__, ("over/1", "1"))
    started = time.monotonic()
    with of_rank(0, store).taking_part():
        timer.start()
    assert "over/1" in store and time.monotonic() - started < 3


@pytest.mark.parametrize("failure", ["Interrupted: SIGINT", "UserError: no image"])
def test_a_process_that_the_same_signal_ended_is_not_reported_as_lost(failure: str) -> None:
    store = board(_0=f"{HOST} {os.getpid()}", _1=f"{HOST} {os.getpid()}")
    store["failure/1"] = failure
    with pytest.raises(Interrupted if "SIGINT" in failure else ProcessLost, match="SIGINT"):
        with of_rank(0, store).reporting_failures(Interrupted):
            raise Interrupted("SIGINT")
