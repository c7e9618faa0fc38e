"""Processes: how they are configured, launched, watched and terminated."""

import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from library.base import launcher
from library.processes.gradient_exchange import exchange_gradients
from library.processes.heartbeat import Heartbeat, Times, has_ended
from library.processes.process_group import PLAIN, Processes, ProcessLost, from_accelerator
from library.training.failures.interruption import Interrupted
from tests.running import ROOT, STARTED
from tests.tiers import first_is_fast


@pytest.mark.parametrize(
    "kind", [kind for kind in DistributedType if kind.name not in PLAIN], ids=lambda kind: kind.name
)
def test_a_configuration_that_shards_a_model_is_refused_with_the_reason(kind: DistributedType) -> None:
    accelerator = SimpleNamespace(distributed_type=kind, num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"configured for {kind.name}.*only plain data-parallel training"):
        from_accelerator(accelerator)


def test_fsdp_and_deepspeed_are_among_the_refused() -> None:
    assert not {"FSDP", "DEEPSPEED", "MEGATRON_LM"} & set(PLAIN)


@pytest.mark.parametrize(("has_gpu", "reason"), [(False, "torch sees no GPU"), (True, "its configuration differs")])
def test_processes_that_do_not_find_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, reason: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"started 2 processes, but accelerate connects only 1.*{reason}"):
        from_accelerator(accelerator)


def test_a_script_started_directly_on_a_cluster_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # of machines
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    assert from_accelerator(accelerator).count == 1


def test_one_process_needs_no_store() -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    processes = from_accelerator(accelerator)
    assert processes.is_main and processes.store is None
    processes.wait_for_all("nothing")
    assert processes.share("seed", "7") == "7"
    assert torch.equal(exchange_gradients(processes, [], torch.ones(2), 2, [True])[0], torch.ones(2))


class Board(dict[str, str]):
    """A stand-in for torch's store that threads share."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        while key not in self:
            pass
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_all_ranks_use_the_seed_of_rank_0_and_the_folder_of_their_machine() -> None:
    board = Board()

    def seen(rank: int) -> tuple[str, str]:
        processes = Processes(rank, 4, rank % 2, 2, store=board)
        shared = processes.share("seed", str(100 + rank)), processes.shared_folder("latents")
        processes.wait_for_all("the end")
        return shared

    with ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(seen, (3, 2, 1, 0)))
    assert {seed for seed, _ in shared} == {"100"}
    folders = [folder for _, folder in shared]
    assert folders[0] == folders[1] != folders[2] == folders[3]


def test_a_process_whose_data_differs_from_rank_0_raises_an_error() -> None:
    board = Board()
    Processes(0, 2, store=board).require_same("the dataset", "3 images")
    Processes(1, 2, store=board).require_same("the dataset", "3 images")
    with pytest.raises(ValueError, match=r"the dataset of process 1 differs.*4 images here, 3 images there"):
        Processes(1, 2, store=board).require_same("the dataset", "4 images")


def test_tables_of_all_processes_are_merged() -> None:
    board = Board()
    with ThreadPoolExecutor(2) as pool:
        tables = ({3: "three"}, {7: "seven", 3: "three"})
        futures = [pool.submit(Processes(rank, 2, store=board).merged, "pictures", tables[rank]) for rank in (0, 1)]
        assert [future.result() for future in futures] == [{3: "three", 7: "seven"}] * 2
    assert Processes().merged("pictures", {1: "one"}) == {1: "one"}


# Thread and CUDA allocator settings that must be set before torch is imported.

AT_THE_IMPORT_OF_TORCH = """
import importlib.machinery, os, platform, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torch" else None

    def create_module(self, spec):
        print(*map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF")))
        raise SystemExit(0)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Watch())
os.getloadavg = lambda: (0.0, 0.0, 0.0)
platform.release = lambda: "6.8.0-generic"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
GROWING = "expandable_segments:True"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch does not use libgomp")
@pytest.mark.parametrize("script", first_is_fast(STARTED))
@pytest.mark.parametrize(
    ("user_settings", "expected"),
    [
        ({}, ["None", "10000", GROWING]),
        ({"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "backend:native"}, ["ACTIVE", "None", "None"]),
    ],
)
def test_scripts_set_the_variables_before_torch_is_imported(
    script: str, user_settings: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.toml"
    prompts.write_text('[[prompts]]\ntarget = "a cat"\naction = "erase"')
    data = ["--prompts_file", str(prompts)] if "leco" in script else ["--train_data_dir", ".", "--resolution", "64"]
    base = ["--pretrained_model_name_or_path", "sd", "--network_module", "networks.lora", "--output_dir", "out"]
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | user_settings
    command = [sys.executable, "-c", AT_THE_IMPORT_OF_TORCH, str(ROOT / f"{script}.py"), *base, *data]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, expected), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch does not use libgomp")
@pytest.mark.parametrize(
    ("load", "busy_cores", "policy", "spin_count"),
    [
        (0.1, 2.0, None, "10000"),  # an idle minute: a brief spike does not count
        (3.0, 0.1, None, "10000"),  # a program that has just ended
        (3.0, 1.0, "PASSIVE", None),
    ],
)
def test_threads_sleep_only_if_another_program_keeps_cores_busy(
    load: float, busy_cores: float, policy: str | None, spin_count: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(launcher, "count_busy_cores", lambda seconds: busy_cores)
    launcher.set_openmp_wait_policy()
    assert (environment.get("OMP_WAIT_POLICY"), environment.get("GOMP_SPINCOUNT")) == (policy, spin_count)


@pytest.mark.parametrize(
    ("system", "release", "user_settings", "expected"),
    [
        ("Linux", "6.8.0-48-generic", {}, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}),
        ("Linux", "6.8.0-48-generic", {"PYTORCH_ALLOC_CONF": "a:b"}, {"PYTORCH_ALLOC_CONF": "a:b"}),
        ("Linux", "6.8.0-48-generic", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("Linux", "5.15.167.4-microsoft-standard-WSL2", {}, {}),
        ("Linux", "4.4.0-19041-Microsoft", {}, {}),
        ("Windows", "11", {}, {}),
        ("Darwin", "24.1.0", {}, {}),
    ],
)
def test_expandable_segments_are_used_on_native_linux_only(
    system: str, release: str, user_settings: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(user_settings)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    launcher.set_cuda_allocator()
    assert environment == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_a_busy_program_counts_as_a_busy_core() -> None:
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert launcher.count_busy_cores(0.5) > 0.5
    finally:
        program.kill()
        program.wait()


# Reporting missing processes, and terminating processes that do not exit by themselves.

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
