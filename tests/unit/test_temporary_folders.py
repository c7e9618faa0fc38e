"""Temporary folders of killed processes are deleted by a later run, those of running processes are not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from library.base.temporary_folders import delete_abandoned_folders, make_temporary_folder
from tests.running import ROOT

WAITS = """
import sys
from library.base.temporary_folders import make_temporary_folder
print(make_temporary_folder("latents", sys.argv[1]), flush=True)
sys.stdin.read()
"""


def start(parent: Path) -> tuple["subprocess.Popen[str]", Path]:
    """Start a process that creates a folder and waits until its input is closed; return both."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(parent)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGKILL")
def test_the_folder_of_a_killed_process_is_deleted_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, killed_folder = start(tmp_path)
    running, running_folder = start(tmp_path)
    own_folder = Path(make_temporary_folder("weights", str(tmp_path)))
    (tmp_path / "latents-of-a-user").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed_folder.name.startswith(f"latents-{killed.pid}-") and killed_folder.is_dir()
    delete_abandoned_folders([tmp_path, tmp_path / "nowhere"])
    assert {path.name for path in tmp_path.iterdir()} == {running_folder.name, own_folder.name, "latents-of-a-user"}
    with monkeypatch.context() as patch:  # as seen from a container that cannot see the process
        patch.setattr(psutil, "pid_exists", lambda number: False)
        delete_abandoned_folders([tmp_path])
    assert running_folder.is_dir() and own_folder.is_dir()
    running.communicate("")
    assert not running_folder.exists(), "a process that ends deletes its folder"
