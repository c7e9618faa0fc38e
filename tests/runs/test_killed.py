"""Killing or interrupting a run at any moment damages no files, and the next start resumes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import LENGTH_BYTES, read_header
from library.data.decoding.npz import LEFT_OVER
from library.training.failures.interruption import Interruption
from library.training.saving.state import read_manifest
from tests.killing import Job, run_jobs
from tests.running import ROOT, Finished, make_images
from tests.tiny.bases import BASES
from tools import start

MOMENTS = ("caching latents", "saving checkpoint", "saving state", "removing old", "sampl", "epoch 2", "saving state")


def start_run(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train_network.py"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def kill_at(process: "subprocess.Popen[bytes]", log: Path, moment: str, delay: float) -> None:
    """Kill the process shortly after `moment` appears in its output, unless it ends before."""
    while process.poll() is None and moment not in log.read_text(encoding="utf-8", errors="replace"):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


def assert_nothing_is_damaged(output: Path, images: Path) -> None:
    for path in output.glob("*.safetensors") if output.is_dir() else ():
        assert load_state_dict(path), path
    for path in output.glob("*-state") if output.is_dir() else ():
        assert read_manifest(path).step > 0
    for path in output.glob("sample/*.png") if output.is_dir() else ():
        from PIL import Image

        Image.open(path).load()
    for path in images.rglob("*_sd.npz"):
        with np.load(path) as archive:
            assert all(np.isfinite(archive[key]).all() for key in archive.files if key.startswith("latents"))


@pytest.mark.nightly
def test_a_repeatedly_killed_run_gives_the_same_result(base_arguments: list[str], images: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 3 --d 1\n")
    arguments = [
        *base_arguments, "--max_train_steps", "12", "--cache_latents_to_disk", "--save_every_n_steps", "1",
        "--save_last_n_steps", "2", "--save_state", "--autoresume", "--sample_every_n_steps", "2", "--sample_prompts",
        str(tmp_path / "prompts.txt"),
    ]  # fmt: skip
    delays = random.Random(20)
    for number, moment in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        kill_at(start_run(arguments, log), log, moment, delays.uniform(0, 0.4))
        assert_nothing_is_damaged(tmp_path / "out", images)
    assert start_run(arguments, tmp_path / "last.log").wait(timeout=300) == 0, (tmp_path / "last.log").read_text()
    alone = [*arguments, "--output_dir", str(tmp_path / "alone")]
    assert start_run(alone, tmp_path / "alone.log").wait(timeout=300) == 0
    actual, other = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("out", "alone"))
    assert actual.keys() == other.keys()
    assert all(torch.equal(actual[key], other[key]) for key in actual)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith((".unfinished", ".replaced"))]


# After kill -9 at any file operation the same command resumes and leaves the same files as an undisturbed run.


@dataclass(frozen=True)
class UndisturbedRun:
    """A run that was not killed, as the reference."""

    start: Path  # a copy of the folder before the run
    folder: Path
    arguments: list[str]
    script: str
    operations: list[str]

    def first(self, pattern: str) -> int:
        """Return the number of the first file operation whose line matches."""
        return next(number for number, line in enumerate(self.operations) if re.search(pattern, line))

    @property
    def kill_points(self) -> list[tuple[int, bool]]:
        """Return every operation, and every safetensors file also half written."""
        points = [(number, False) for number in range(len(self.operations))]
        return points + [(number, True) for number, line in enumerate(self.operations) if line.startswith("save ")]


def run_undisturbed(
    root: Path, arguments: list[str], num_images: int, prompts: str, script: str = "train_network"
) -> UndisturbedRun:
    """Run once with relative paths, since states record the command line."""
    make_images(root / "start" / "data" / "1_thing", num_images)
    (root / "start" / "prompts.txt").write_text(prompts)
    shutil.copytree(root / "start", root / "whole")
    (result,) = run_jobs([Job(arguments, str(root / "whole"), script)], root)
    assert result.status == 0, result.output
    return UndisturbedRun(root / "start", root / "whole", arguments, script, result.operations)


Content = bytes | tuple[dict[str, str], bytes] | dict[str, bytes]


def content(folder: Path) -> dict[str, Content]:
    """Return a run's files by path, without the tests' files and partial caches, which are kept for an hour."""
    test_files = ("log", "operations", "prompts.txt")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: content_of(path)
        for name, path in files.items()
        if not (name in test_files or LEFT_OVER.fullmatch(path.name))
    }


def content_of(path: Path) -> Content:
    """Return a file's content without random parts: safetensors shuffles metadata, archives contain times."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        return dict(header.metadata), path.read_bytes()[LENGTH_BYTES + header.num_bytes :]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    return path.read_bytes()


def assert_resumes(reference: UndisturbedRun, folder: Path, points: Sequence[tuple[int, bool]]) -> None:
    """Kill a run at each point (operation number, half a file left) and compare the files of the resumed run."""
    jobs = []
    for number, is_half in points:
        at = str(shutil.copytree(reference.start, folder / f"{number}{'-half' * is_half}"))
        jobs.append(Job(reference.arguments, at, reference.script, dies_at=number, leaves_half=is_half))
        jobs.append(Job(reference.arguments, at, reference.script))
    results = run_jobs(jobs, folder, timeout=7200)
    wanted = content(reference.folder)
    for (number, is_half), job, killed, after in zip(points, jobs[::2], results[::2], results[1::2], strict=True):
        point = f"at {number} ({killed.operations[-1]}{', half written' * is_half})"
        assert killed.status == -signal.SIGKILL, f"{point}: {killed.output}"
        assert after.status == 0, f"{point}: {after.output}"
        actual = content(Path(job.folder))
        assert actual.keys() == wanted.keys(), point
        assert not [name for name in wanted if actual[name] != wanted[name]], point


def arguments(base: list[str], *more: str) -> list[str]:
    return [
        *base, "--train_data_dir", "data", "--caption_extension", ".txt",
        "--resolution", "64", "--train_batch_size", "2", "--output_dir", "out", "--output_name", "mine", "--seed", "5",
        "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only", "--learning_rate",
        "1e-3", "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--save_state", "--autoresume",
        "--save_last_n_steps", "1", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1", "--sample_prompts",
        "prompts.txt", "--no_report", *more,
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_run_killed_around_its_saves_loses_nothing(tiny_sd_folder: Path, tmp_path: Path) -> None:
    words = ["--max_train_steps", "3", "--save_every_n_steps", "1", "--sample_every_n_epochs", "3"]
    base = ["--pretrained_model_name_or_path", str(tiny_sd_folder)]
    reference = run_undisturbed(tmp_path, arguments(base, *words), 2, "a cat --w 64 --h 64 --s 1 --d 1\n")
    points = [
        (reference.first(r"save \.\.mine-000001"), False),  # the step's state exists, the epoch's file does not
        (reference.first(r"unlink mine-step00000001"), False),  # rotation
        (reference.first(r"open \.mine_e000003_00"), False),  # an image of the last step
        (reference.first(r"save \.\.mine\."), True),  # the last step's state exists, the last file is half written
    ]
    assert_resumes(reference, tmp_path, points)


FAMILIES = ("sd", "flux", "lumina")
"""A U-Net, a transformer of two streams and one of one stream; the transformers with cached captions too."""


def everything(name: str, folder: Path) -> list[str]:
    """Return arguments with caching, states, rotation, previews and validation."""
    words = [
        "--max_train_steps", "6", "--save_every_n_steps", "2", "--sample_every_n_epochs", "1", "--validation_split",
        "0.2", "--keep_best_checkpoint",
    ]  # fmt: skip
    if name != "sd":
        words.append("--cache_text_encoder_outputs_to_disk")
    return arguments(BASES[name].build(folder), *words)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_killed_at_every_file_operation_loses_nothing(name: str, tmp_path: Path) -> None:
    prompts = "a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n"
    reference = run_undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    # every point for one family, every fifth for the others, since each point takes two runs
    assert_resumes(reference, tmp_path, reference.kill_points[:: 1 if name == "sd" else 5])


@pytest.mark.nightly
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_run_of_a_transformer_killed_around_its_caches_and_saves_loses_nothing(name: str, tmp_path: Path) -> None:
    prompts = "a cat --w 64 --h 64 --s 2 --d 1\n"
    reference = run_undisturbed(tmp_path, everything(name, tmp_path / "base"), 5, prompts, BASES[name].script)
    points = [
        (reference.first(rf"replace \.\d\d_0064x0064_{name}"), False),  # an image's latents
        (reference.first(r"replace \.\d\d_.*_te\."), False),  # an image's captions
        (reference.first(r"save \.\.mine-000001"), True),
        (reference.first(r"open \.mine_e000001_00"), False),
        (reference.first(r"save \.\.mine\."), True),
    ]
    assert_resumes(reference, tmp_path, points)


# Signals before the first step, also while the main thread waits inside torch for other processes.

WAITS = """
import logging, sys
from datetime import timedelta
from pathlib import Path
from torch.distributed import TCPStore
from library.training.failures.interruption import Interruption
logging.basicConfig()
interruption = Interruption()
interruption.install()
store = TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(minutes=5))
Path(sys.argv[1]).touch()
store.get("what no process sets")
"""


def start_waiting_process(tmp_path: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process and return it once it waits in torch's store."""
    command = [*before, sys.executable, "-c", WAITS, str(tmp_path / "waits")]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(600):
        if (tmp_path / "waits").exists():
            return process
        time.sleep(0.1)
    raise AssertionError("it did not come to wait")


@pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly)]
)
def test_a_signal_ends_a_process_that_waits_for_others(tmp_path: Path, number: int, status: int) -> None:
    """The store would wait for five minutes, during which Python calls no signal handler."""
    process = start_waiting_process(tmp_path)
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    assert process.returncode == status
    assert "received while others were waited for: nothing was trained, nothing to save" in log


@pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")
@pytest.mark.nightly
def test_a_killed_launcher_leaves_no_orphaned_process(tmp_path: Path) -> None:
    launcher = start_waiting_process(tmp_path, "sh", "-c", '"$@" & wait', "sh", ACCELERATE_MIXED_PRECISION="no")
    launcher.kill()
    _, log = launcher.communicate(timeout=30)  # the pipe closes once the child process has ended
    assert "the launcher of this run is gone before the first step" in log


@pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")
def test_once_training_has_begun_only_the_loop_reacts_to_a_lost_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watching thread may wake after training began: its signal would be the second, which stops at once."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    interruption = Interruption()
    sent: list[tuple[int, ...]] = []
    launcher = os.getppid()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def begin_training(_: float) -> None:
        interruption.defer()
        monkeypatch.setattr(os, "getppid", lambda: launcher + 1)
        assert interruption.is_requested

    monkeypatch.setattr("library.training.failures.interruption.time.sleep", begin_training)
    monkeypatch.setattr(os, "kill", lambda *signal_arguments: sent.append(signal_arguments))
    interruption._watch(reader, writer)
    monkeypatch.undo()
    assert sent == []


@pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")
@pytest.mark.parametrize("met", ["transformers.CLIPTokenizer.from_pretrained", "torch.optim.AdamW.step"])
def test_a_signal_is_not_taken_for_an_error_of_the_code_that_it_meets(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    """Both calls stand in a `try` that turns any exception into a message about the tokenizer or the optimizer."""

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(met, interrupt)
    done = train([*base_arguments, "--optimizer_args", "eps=1e-7"])
    assert done.status == 130
    assert "SIGINT received before the first step: nothing was trained, nothing to save" in done.stderr
    assert "ERROR" not in done.stderr


SLOW_DISK = """
import os, time
replace = os.replace
def replace_slowly(source, target, **keywords):
    if os.fspath(target).endswith(".safetensors"):
        time.sleep(1)
    replace(source, target, **keywords)
os.replace = replace_slowly
"""


@pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")
@pytest.mark.slow
def test_ctrl_c_in_the_readme_command_saves_adapter_and_state_and_says_how_to_continue(tmp_path: Path) -> None:
    """`tools/start.py train` is signalled by the terminal too, and must not end the training while that saves."""
    for name in ("slow", "venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    start.python_path(tmp_path / "venv").symlink_to(sys.executable)
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    for stamp, content in start.make_stamps(tmp_path / "venv", sys.version_info[:3], start.RUN_REQUIREMENTS).items():
        stamp.write_text(content)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "start.py"), "train", "--venv", str(tmp_path / "venv"),
         str(ROOT / start.PHOTOS), "--base", str(ROOT / start.TOY_BASE), "--trigger", "heart", "--yes", "--name",
         "mine"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "slow"), sysconfig.get_path("purelib")])},
    )  # fmt: skip
    log = ""
    while process.stdout is not None and " left" not in log and (read := process.stdout.read(1)):
        log += read
    os.killpg(process.pid, signal.SIGINT)
    log += process.communicate()[0]
    assert process.returncode == 0, log
    (adapter,) = (tmp_path / "output" / "mine").glob("mine-step*.safetensors")
    assert len(load_file(adapter)) == 420
    assert (adapter.with_name(f"{adapter.stem}-state") / "train_state.json").is_file()
    assert "To continue, give the same command again" in log
