"""Runs of tools/front_end.py that are killed at each of their file operations in turn.

`python -I -S tests/front_end_kills.py <job.json>` imports only the standard library and forks for each run. Each run
counts its file operations and the programs that it starts, and gets SIGKILL before the chosen one; a file that it has
just opened for writing is left empty.
"""

import builtins
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tree = dict[str, str]
Tool = Callable[[list[str]], int]


def read_tree(folder: Path) -> Tree:
    """Return the files and folders below a folder, without git's and compiled ones: path -> content."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if not {".git", "__pycache__"} & set(path.relative_to(folder).parts)
    }


def run(tool: Tool, words: list[str], dies_at: int | None) -> int:
    """Run the tool in a fork. Return its exit status; -9 after SIGKILL."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            watch(dies_at)
            status = tool(words)
        finally:
            os._exit(status)
    _, raw = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(raw)


def watch(dies_at: int | None) -> None:
    """Count this process's file operations and programs, and kill it at the chosen one."""
    count = 0

    def is_last() -> bool:
        nonlocal count
        count += 1
        return count - 1 == dies_at

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            if is_last():
                die()
            return plain(*arguments, **keywords)

        return operation

    plain_open = io.open

    def opened(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        dies = bool(set("wax+") & set(mode)) and is_last()
        file = plain_open(path, mode, *arguments, **keywords)
        if dies:
            die()
        return file

    for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "chmod"):
        setattr(os, name, watched(getattr(os, name)))
    subprocess.run = watched(subprocess.run)  # type: ignore[assignment]
    builtins.open = io.open = opened  # type: ignore[assignment]


def kill_everywhere(tool: Tool, template: Path, killed: list[str], after: list[list[str]]) -> list[dict[str, Any]]:
    """Kill the command `killed` at each operation in a copy of `template`, then run the commands `after` in turn.

    Returns for each kill the exit statuses and the tree after each command. {} in a command stands for the copy.
    """
    found = []
    for dies_at in range(10_000):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "gui"
            shutil.copytree(template, copy, symlinks=True)
            if run(tool, [word.format(copy) for word in killed], dies_at) != -signal.SIGKILL:
                return found
            trees = [(run(tool, [word.format(copy) for word in words], None), read_tree(copy)) for words in after]
            found.append({"statuses": [status for status, _ in trees], "trees": [tree for _, tree in trees]})
    raise AssertionError("the command does not end")


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, job["suite"])
    from tools.front_end import main

    print(json.dumps(kill_everywhere(main, Path(job["template"]), job["killed"], job["after"])))
