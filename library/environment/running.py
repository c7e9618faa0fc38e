"""Running commands that answer Ctrl-C themselves, and going on as one.

An old Python must be able to parse this file, so annotations are quoted.
"""

import os
import subprocess
import sys
from collections import deque

from library.base.terminal import print_line
from library.environment.requirements import ROOT

INTERRUPTED = 130  # exit status of shells after Ctrl-C


def child_environment() -> "dict[str, str]":
    """Return the environment of all child processes: UTF-8 output, no model hub, no user-site installs by pip."""
    settings = {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PIP_USER": "0"}
    return {**os.environ, **settings}


def run(command: "list[str]", keep_errors_in: "deque[str] | None" = None, quiet: bool = False) -> int:
    """Run a command in the repository's folder and return its exit status.

    `keep_errors_in` collects the lines of its standard error, which are also shown. Raises KeyboardInterrupt once a
    command ended after Ctrl-C, see `wait`.
    """
    process = subprocess.Popen(
        command,
        cwd=str(ROOT),
        env=child_environment(),
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.DEVNULL if quiet else subprocess.PIPE if keep_errors_in is not None else None,
        universal_newlines=True,
        encoding="utf-8",
        errors="replace",
    )
    exit_code, is_interrupted = wait(process, keep_errors_in)
    if is_interrupted:
        raise KeyboardInterrupt
    return exit_code


def wait(process: "subprocess.Popen[str]", keep_errors_in: "deque[str] | None" = None) -> "tuple[int, bool]":
    """Wait for a command. Return its exit status, and True after Ctrl-C.

    The terminal sends Ctrl-C to the command too, which gets time to save and exit; the third one kills it.
    """
    num_interrupts = 0
    while True:
        try:
            if keep_errors_in is not None and process.stderr is not None:
                for line in process.stderr:
                    print_line(line, sys.stderr, end="")
                    keep_errors_in.append(line)
            exit_code = process.wait()
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            if num_interrupts >= 3:
                process.kill()
    # A shell reports death by signal n as status 128 + n, subprocess as -n.
    return int(128 - exit_code if exit_code < 0 else exit_code), num_interrupts > 0


def replace_process(command: "list[str]", platform: str = sys.platform) -> int:
    """Go on as a command, in this folder and environment, so that signals reach it alone.

    Windows cannot replace a process: there the command is waited for, and its exit status returned.
    """
    if platform == "win32":
        return wait(subprocess.Popen(command, universal_newlines=True))[0]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)
