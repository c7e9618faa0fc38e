"""A profiler trace of some steps."""

import gzip
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from library.base.atomic_files import atomic_path
from library.checkpoints.overwriting import find_place, known_by_start

logger = logging.getLogger(__name__)

PROFILE = known_by_start("a profile of a run", lambda start: start.startswith(b"\x1f\x8b"))  # gzip
NUM_BEFORE = 2  # steps before it: the first initializes, the second warms up the profiler


@contextmanager
def profile_steps(num_steps: int, path: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Write a trace of steps 3 to 2 + `num_steps` of this run, or of those that take place, to `path`.

    Yields a function to call after every step. Does nothing for 0 steps.
    """
    if not num_steps:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    def write(trace: Any) -> None:
        place = find_place(path, PROFILE)
        place.parent.mkdir(parents=True, exist_ok=True)
        # torch compresses a trace line by line, with a hundred thousand lines per second of training
        with atomic_path(place) as packed, TemporaryDirectory(dir=place.parent) as folder:
            plain = Path(folder) / "trace.json"
            trace.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
        logger.info("a trace of steps for https://ui.perfetto.dev: %s", place)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=NUM_BEFORE - 1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
