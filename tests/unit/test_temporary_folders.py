"""Temporary folders of killed processes are deleted by a later run, those of running processes are not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from library.temporary_folders import delete_abandoned_folders, make_temporary_folder
from tests.running import ROOT

WAITS = """
import sys
from library.temporary_folders import make_temporary_folder
print(make_temporary_folder("latents", sys.argv[1]), flush=True)
sys.stdin.read()
"""


def start(parent: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process that has made a folder and waits for the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(parent)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGKILL")
def test_the_folder_of_a_killed_process_is_deleted_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, left = start(tmp_path)
    running, kept = start(tmp_path)
    own = Path(make_temporary_folder("weights", str(tmp_path)))
    (tmp_path / "latents-of-a-user").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert left.name.startswith(f"latents-{killed.pid}-") and left.is_dir()
    delete_abandoned_folders([tmp_path, tmp_path / "nowhere"])
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, own.name, "latents-of-a-user"}
    with monkeypatch.context() as patch:  # as from a container that does not see the process
        patch.setattr(psutil, "pid_exists", lambda number: False)
        delete_abandoned_folders([tmp_path])
    assert kept.is_dir() and own.is_dir()
    running.communicate("")
    assert not kept.exists(), "a process that ends deletes its folder"
