"""Two runs with the same name: the second is refused, unless the first has died."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.options.train import TrainOptions
from library.training.saving.run_lock import lock_path, run_lock
from tests.running import ROOT
from tests.unit.data.builders import full_disk, options_of, unwritable

HOLD = """
import os, sys, time
from library.options.output.saving import SavingOptions
from library.training.saving.run_lock import run_lock
with run_lock(SavingOptions(output_dir=sys.argv[1], output_name="mine")):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.close(1)
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""
OtherRun = Callable[[str], subprocess.Popen[str]]


def options(folder: Path, *more: str) -> TrainOptions:
    return options_of("", "--output_dir", str(folder), "--output_name", "mine", *more)


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[OtherRun]:
    """Return a function that starts a process holding the lock; with "fork" it has a child that outlives it."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), how]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def hold_lock(chosen: TrainOptions) -> Iterator[None]:
    with run_lock(chosen.saving):
        yield


def test_the_error_for_a_second_run_names_the_process_that_holds_the_lock(tmp_path: Path, other_run: OtherRun) -> None:
    process = other_run("")
    with pytest.raises(ValueError) as refused, hold_lock(options(tmp_path / "out")):
        pass
    message = str(refused.value)
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in message
    assert "use another --output_name or --output_dir" in message
    with hold_lock(options_of("", "--output_dir", str(tmp_path / "out"), "--output_name", "other")):
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".mine.lock", ".other.lock"]


@pytest.mark.parametrize("how", ["", "fork"])
def test_a_killed_run_releases_the_lock(tmp_path: Path, other_run: OtherRun, how: str) -> None:
    """Even while a process that it forked, such as an image loader, is alive."""
    process = other_run(how)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with hold_lock(options(tmp_path / "out")):
        assert str(os.getpid()) in lock_path(tmp_path / "out", "mine").read_text()
    assert not list((tmp_path / "out").iterdir())


def test_the_lock_file_is_deleted_afterwards(tmp_path: Path) -> None:
    with hold_lock(options(tmp_path / "new" / "out")):
        assert lock_path(tmp_path / "new" / "out", "mine").exists()
    assert not (tmp_path / "new" / "out").exists()
    with hold_lock(options(tmp_path / "out")):
        (tmp_path / "out" / "mine.safetensors").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.safetensors"]


def test_a_run_that_ends_while_the_lock_is_taken_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is deleted by the time it is locked: another run could lock a new file of that name."""
    from library.training.saving import run_lock as module

    locked: list[bool] = []

    def lock_late(file: object) -> None:
        if not locked:
            lock_path(tmp_path, "mine").unlink()
        locked.append(True)

    monkeypatch.setattr(module, "lock", lock_late)
    with hold_lock(options(tmp_path)):
        assert len(locked) == 2 and lock_path(tmp_path, "mine").exists()


def test_only_the_main_process_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with hold_lock(options(tmp_path / "out")):
        assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    from library.training.saving import run_lock as module

    def lock(file: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, "lock", lock)
    with hold_lock(options(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())
    assert "this file system has no locks; make sure that no second run writes there" in caplog.text


def test_a_full_disk_is_an_error_of_the_output_folder_and_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(UserError, match=r"--output_dir .*out cannot be written: .*; make room"):
        with hold_lock(options(tmp_path / "out")):
            pass
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error_of_its_option(tmp_path: Path) -> None:
    with unwritable(tmp_path), pytest.raises(UserError, match=r"--output_dir .*out cannot be written"):
        with hold_lock(options(tmp_path / "out")):
            pass
