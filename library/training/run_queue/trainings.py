"""The process of a training: how it is started, stopped and killed. `platform` is that of `sys`."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.training.run_queue.folder import Queue
from library.training.run_queue.jobs import Job
from library.training.run_queue.tickets import ProcessId, Ticket

ROOT = Path(__file__).parents[3]  # of the training scripts
# Windows's constants, which Python has there alone.
CREATE_NEW_PROCESS_GROUP, CTRL_BREAK_EVENT = 0x200, 1
# `sys.path` begins with the folder of the scripts, as it does if one is started.
START = "import sys; sys.path[0] = sys.argv[1]; from library.training.run_queue.child import main; main()"


def group_options(platform: str = sys.platform) -> Mapping[str, Any]:
    """Return the arguments of Popen that keep a terminal's Ctrl-C from the training; its queue passes that on."""
    return {"creationflags": CREATE_NEW_PROCESS_GROUP} if platform == "win32" else {"start_new_session": True}


def saving_signal(platform: str = sys.platform) -> int:
    """Return the signal after which a training saves and ends."""
    # Windows passes Ctrl-C to no process group but that of the terminal, and SIGTERM there ends a process at once.
    return CTRL_BREAK_EVENT if platform == "win32" else signal.SIGTERM


def interrupt(process: ProcessId, platform: str = sys.platform) -> None:
    """Let a training save and end. Raises OSError on Windows if it was started in another terminal."""
    if process.is_alive:
        with suppress(ProcessLookupError):
            os.kill(process.pid, saving_signal(platform))


def kill(process: ProcessId) -> None:
    """End a training and the processes that it started, without saving."""
    import psutil

    if not process.is_alive:
        return
    with suppress(psutil.Error):
        training = psutil.Process(process.pid)
        for one in (training, *training.children(recursive=True)):
            with suppress(psutil.Error):
                one.kill()


def start_training(queue: Queue, ticket: Ticket, job: Job, scripts: Path = ROOT) -> "subprocess.Popen[bytes]":
    """Start the training of a claimed job by its script in the folder `scripts`; the output goes to the end of its log.
    Raises OSError if that fails."""
    assert ticket.claim is not None
    config = queue.logs / f"{ticket.id}.toml"
    write_whole(config, job.text)
    # Absolute, because the training has its own working folder.
    folder, own = queue.folder.absolute(), ["--config_file", str(config.absolute()), *job.options]
    own += ["--autoresume", "--exit_status_on_stop"]
    own_state = job.find_own_state()
    own += [] if own_state is None else ["--resume", str(own_state)]  # the last one counts
    own += [] if job.events else ["--log_events", str(queue.events_of(ticket, job).absolute())]
    command = [sys.executable, "-c", START, str(ROOT), str(folder), ticket.file_name, str(scripts / job.script), *own]
    gpu = {"CUDA_VISIBLE_DEVICES": ticket.claim.slot} if ticket.claim.slot else {}
    with queue.log_of(ticket).open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=job.folder,
            env={**os.environ, **gpu},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **group_options(),
        )
