"""Processes of the worker that the server waits for."""

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from library.base.json_text import InvalidJson, parse_json
from library.training.run_queue.trainings import ROOT

logger = logging.getLogger(__name__)

# `sys.path` begins with the suite's folder, whatever the working folder has.
START = "import sys; sys.path[0] = sys.argv[1]; from library.page.worker import main; main()"
LINE_BYTES = 2**27  # a plan holds the captions of thousands of photos
Finish = Callable[[Any], Mapping[str, Any] | None]


@dataclass(frozen=True)
class TaskState:
    """The state of a task that the page shows."""

    state: Literal["running", "done", "failed"] = "running"
    done: int = 0
    total: int = 0
    error: Mapping[str, Any] | None = None
    result: Mapping[str, Any] | None = None  # what is small enough to be sent to every page


@dataclass
class Tasks:
    """The tasks of a server, one at a time under each name; a new one ends the old one of its name."""

    folder: Path  # working folder of the processes
    log: Path
    changed: Callable[[], None]
    states: dict[str, TaskState] = field(default_factory=dict)
    _running: dict[str, "asyncio.Task[Any]"] = field(default_factory=dict)

    def begin(self, name: str, task: str, inputs: Mapping[str, Any], finish: Finish) -> None:
        """Start a task. `finish` gets its result, and returns what the state of the task holds of it."""
        self.cancel(name)
        self.states[name] = TaskState()
        self._running[name] = asyncio.get_running_loop().create_task(self._run(name, task, inputs, finish))
        self.changed()

    def cancel(self, name: str) -> None:
        """End a task, if it runs, and forget it."""
        if (running := self._running.pop(name, None)) is not None:
            running.cancel()
            self.states.pop(name, None)
            self.changed()

    def close(self) -> None:
        for name in list(self._running):
            self.cancel(name)

    async def _run(self, name: str, task: str, inputs: Mapping[str, Any], finish: Finish) -> None:
        answer = await self._work(name, task, inputs)
        if "result" in answer:
            self.states[name] = TaskState("done", result=finish(answer["result"]))
        else:
            self.states[name] = TaskState("failed", error=answer["error"])
        self._running.pop(name, None)
        self.changed()

    async def _work(self, name: str, task: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run the process and return its last answer."""
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", START, str(ROOT), task, cwd=self.folder, limit=LINE_BYTES,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(inputs).encode() + b"\n")
            process.stdin.close()
            async for line in process.stdout:
                values = read_answer(line)
                if "result" in values or "error" in values:
                    await process.wait()
                    return values
                self.states[name] = replace(self.states[name], done=values["done"], total=values["total"])
                self.changed()
            return {"error": {"message": f"{task}: status {await process.wait()}", "is_bug": True}}
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()


def read_answer(line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except InvalidJson as error:
        return {"error": {"message": str(error), "is_bug": True}}
    return values if isinstance(values, dict) else {"error": {"message": repr(values), "is_bug": True}}
