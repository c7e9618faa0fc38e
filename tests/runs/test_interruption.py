"""Signals before the first step, also while the main thread waits inside torch for other processes."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library.training.failures.interruption import Interruption
from tests.running import ROOT, Finished
from tools import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")

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


@pytest.mark.nightly
def test_a_killed_launcher_leaves_no_orphaned_process(tmp_path: Path) -> None:
    launcher = start_waiting_process(tmp_path, "sh", "-c", '"$@" & wait', "sh", ACCELERATE_MIXED_PRECISION="no")
    launcher.kill()
    _, log = launcher.communicate(timeout=30)  # the pipe closes once the child process has ended
    assert "the launcher of this run is gone before the first step" in log


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
