"""The beginning and the end of a training's process: it enters itself into its job's name before it trains.

A queue that was killed meanwhile has lost the job, and its training ends before it has begun: so no job ever runs twice
at a time.
"""

import runpy
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from library.training.run_queue.folder import Queue
from library.training.run_queue.tickets import ProcessId, Ticket


def main() -> None:
    """Run a training script in this process; the arguments are those of `start_training`."""
    folder, file_name, script, *arguments = sys.argv[2:]
    ticket, queue = Ticket.parse(file_name), Queue(Path(folder))
    assert ticket is not None and ticket.claim is not None
    own = replace(ticket, claim=replace(ticket.claim, process=ProcessId.current()))
    if not queue.move(ticket, "running", "running", own):
        return
    sys.argv = [script, *arguments]
    status = 1  # of an exception, whose traceback Python prints
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        assert own.claim is not None
        if ProcessId.current() == own.claim.process:  # a forked process is not the training
            with suppress(OSError):  # removed meanwhile, or the folder is gone; the job then counts as killed
                queue.move(own, "running", "running", replace(own, claim=replace(own.claim, status=status & 0xFF)))
