"""Which adapters and states a run takes for its own, and two runs with the same name."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from library.base.errors import UserError
from library.checkpoints.hashes import with_hashes
from library.checkpoints.overwriting import judge
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from library.options.train import TrainOptions
from library.training.reporting.event_stream import Events
from library.training.saving.names import Names
from library.training.saving.own_files import move_changed, remove
from library.training.saving.run_lock import lock_path, run_lock
from tests.running import ROOT
from tests.unit.data.builders import full_disk, options_of, unwritable

LORA = {"lora_unet_x.lora_down.weight": torch.ones(1), "lora_unet_x.alpha": torch.ones(())}
BASE = {"model.diffusion_model.out.0.weight": torch.ones(1)}
MODULE = {"ss_network_module": "networks.lora"}
SD_SCRIPTS = ("model.safetensors", "optimizer.bin", "scheduler.bin", "sampler.bin", "random_states_0.pkl")


def names_of(folder: Path, output_name: str | None = "cat") -> Names:
    return Names(folder, output_name, "safetensors")


@pytest.mark.parametrize(
    ("output_name", "metadata", "expected"),
    [
        ("cat", {**MODULE, "ss_output_name": "cat"}, "ours"),
        ("cat", MODULE, "ours"),  # --no_metadata of either program
        ("cat", {**MODULE, "ss_output_name": "dog"}, "foreign"),
        (None, {**MODULE, "ss_output_name": "None"}, "ours"),
        (None, {**MODULE, "ss_output_name": "dog"}, "foreign"),
        ("cat", {"ss_output_name": "cat"}, "foreign"),
        ("cat", {**MODULE, "ss_output_name": "cat", "written_by": "tools/resize_lora.py: cat.safetensors"}, "foreign"),
        ("cat", {}, "foreign"),
    ],
)
def test_an_adapter_is_known_by_module_and_name(
    tmp_path: Path, output_name: str | None, metadata: dict[str, str], expected: str
) -> None:
    mark = metadata.pop("written_by", None) if "written_by" in metadata else None
    save_safetensors(tmp_path / "cat.safetensors", LORA, metadata, mark)
    assert judge(tmp_path / "cat.safetensors", names_of(tmp_path, output_name).adapter_kind) == expected


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_a_file_that_cannot_be_read_is_not_ours(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"cat.{extension}"
    path.write_bytes(b"half a file")
    assert judge(path, names_of(tmp_path).adapter_kind) == "foreign"


def test_a_pickled_adapter_is_known_by_its_keys_or_its_mark(tmp_path: Path) -> None:
    kind, path = names_of(tmp_path).adapter_kind, tmp_path / "cat.ckpt"
    for tensors, mark, expected in (
        (LORA, None, "ours"),
        (BASE, None, "foreign"),
        (BASE, "training: cat.ckpt", "ours"),
        (LORA, "training: dog.ckpt", "foreign"),
    ):
        save_pickle_state_dict(path, tensors, mark=mark)
        assert judge(path, kind) == expected, (mark, expected)


def write_state(folder: Path, names: tuple[str, ...], output_name: str | None = None) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x")
    if output_name is not None:
        (folder / "train_state.json").write_text(json.dumps({"options": {"output_name": output_name}}))
    return folder


def test_a_state_is_known_by_its_files_and_the_name_that_it_records(tmp_path: Path) -> None:
    kind = names_of(tmp_path).state_kind
    ours = ("network.safetensors", "training.safetensors")
    for name, files, output_name, expected in (
        ("a", ours, "cat", "ours"),
        ("b", SD_SCRIPTS, None, "ours"),
        ("c", (*SD_SCRIPTS, ".DS_Store", "train_state.json"), None, "ours"),
        ("d", (*ours, "photo.png"), "cat", "foreign"),
        ("e", (*SD_SCRIPTS, "unet"), None, "foreign"),
        ("f", ("model.safetensors", "model_index.json"), None, "foreign"),
        ("g", ours, None, "foreign"),
        ("h", (), None, "free"),
    ):
        assert judge(write_state(tmp_path / f"{name}-state", files, output_name), kind) == expected, name


def test_a_state_of_another_run_is_foreign_but_one_that_was_renamed_is_not(tmp_path: Path) -> None:
    kind, files = names_of(tmp_path).state_kind, ("network.safetensors",)
    assert judge(write_state(tmp_path / "cat-251130-state", files, "cat-251130"), kind) == "foreign"
    assert judge(write_state(tmp_path / "cat-state", files, "dog"), kind) == "ours"


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_an_outdated_adapter_that_another_program_changed_is_not_deleted(
    tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind, path = names_of(tmp_path).adapter_kind, tmp_path / f"cat.{extension}"
    metadata = with_hashes(LORA, {**MODULE, "ss_output_name": "cat"})
    changed = {name: tensor + 1 for name, tensor in LORA.items()}
    for tensors, is_kept in ((LORA, False), (changed, True)):
        if extension == "safetensors":
            save_safetensors(path, tensors, metadata)
        else:
            save_pickle_state_dict(path, LORA, mark=f"training: {path.name}")
            with ZipFile(path) as archive:
                comment = archive.comment
            save_pickle_state_dict(path, tensors)
            with ZipFile(path, "a") as archive:
                archive.comment = comment
        remove("checkpoint", path, kind, Events([]))
        assert path.exists() == is_kept
    assert f"{path} is outdated, but kept" in caplog.text


def test_an_adapter_that_another_program_saved_as_a_pickle_makes_way_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a program keeps no mark, so nothing tells of what the file held before."""
    path = tmp_path / "cat.ckpt"
    save_pickle_state_dict(path, LORA, mark=f"training: {path.name}")
    move_changed(path)
    assert path.exists()
    torch.save(torch.load(path), path)
    remove("checkpoint", path, names_of(tmp_path).adapter_kind, Events([]))
    assert path.exists() and f"{path} is outdated, but kept" in caplog.text
    move_changed(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.changed.ckpt"]


# Two runs with the same name: the second is refused, unless the first has died.

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
