"""Measures how long steps take, how their time is spent, and their arithmetic throughput."""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from library.memory.planner.counter import FlopCounter
from library.training.reporting.slowdown import ReservedWatch, SlowdownWatch, StepSeconds, read_machine
from library.types import Batch

logger = logging.getLogger(__name__)

Stage = Literal["waiting for data", "copying", "forward", "backward", "optimizer", "validation", "saving", "previews"]
IN_STEP: tuple[Stage, ...] = ("waiting for data", "copying", "forward", "backward", "optimizer")
ON_GPU: tuple[Stage, ...] = ("copying", "forward", "backward", "optimizer")  # the host only queues them
BETWEEN: tuple[Stage, ...] = ("validation", "saving", "previews")

NUM_REMEMBERED = 100  # steps in the median
NUM_KNOWN = 20  # steps required before one is called slow
SLOW = 1.5  # ratio to the median
LEAST_EXTRA_S = 0.1  # seconds; smaller excesses are noise
QUIET_S = 60.0  # seconds between messages about slow steps
MANY_PAGES = 500  # pages read back from disk in a step, 2 MB

BatchShape = tuple[int, int, int]
"""Images, height, width."""


@dataclass(frozen=True)
class StepFigures:
    """The measurements of a step."""

    seconds: float  # without the time between steps
    parts: Mapping[Stage, float]  # seconds per stage; the rest is the trainer's overhead
    num_images: int  # of this process
    flops: float | None  # of this process; None if a batch could not be counted


@dataclass
class StepTimes:
    """Measures a run's steps; costs microseconds per step.

    `num_processes` share each step; `peak` is the peak FLOP/s of each one's device, if known. GPU spans are measured on
    the GPU and read one step late, so that the host never waits for them.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_processes: int = 1
    peak: float | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._began: Any = None
        self._between = 0.0  # seconds since the last step that belong to no step
        self._spans: list[tuple[Stage, Any, Any]] = []
        self._shapes: list[BatchShape] = []
        self._new_shapes: set[BatchShape] = set()
        self._flops: dict[BatchShape, float] = {}
        self._counts_inputs = False  # during a forward pass of training
        self._inputs: set[tuple[torch.Size, ...]] = set()  # of this epoch
        self._num_inputs: list[int] = []  # of each earlier epoch
        self._late: Callable[[], StepFigures] | None = None
        self._recent: deque[StepFigures] = deque(maxlen=NUM_REMEMBERED)
        self._num_steps = self._num_images = 0  # without the first step
        self._seconds = 0.0
        self._parts: defaultdict[Stage, float] = defaultdict(float)
        self._noted_at: float | None = None
        self._noted_unknown = False  # whether a slow step of unknown cause was reported
        self._pressure = measure_pressure(self.device)
        read = partial(read_machine, self.device, num_pages_read_back)
        self._watch, self._reserved = SlowdownWatch(read), ReservedWatch(read)

    # Measuring

    def start(self) -> None:
        self._began = self._mark()

    def start_epoch(self) -> None:
        if self._inputs:
            self._num_inputs.append(len(self._inputs))
        self._inputs = set()

    def watch_inputs(self, denoiser: nn.Module) -> RemovableHandle:
        """Count the distinct shapes of a denoiser's inputs in each epoch. A GPU prepares its kernels for each of them.

        Captions of different lengths are different shapes too.
        """

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._counts_inputs:
                values = tree_leaves((args, kwargs))
                self._inputs.add(tuple(value.shape for value in values if isinstance(value, Tensor)))

        return denoiser.register_forward_pre_hook(note, with_kwargs=True)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Attribute the time of the block to a stage."""
        mark = self._mark_on_gpu if self.device.type == "cuda" and name in ON_GPU else self.clock
        began = mark()
        try:
            with record_function(name):
                yield
        finally:
            ended = mark()
            if name in BETWEEN:
                self._between += ended - began
                self._parts[name] += ended - began
            else:
                self._spans.append((name, began, ended))

    @contextmanager
    def counted(self, batch: Batch) -> Iterator[Callable[[], None]]:
        """Measure a forward and backward pass; yields a function to call between the two.

        Operations are counted on the first batch of each shape, which then takes some tenths of a second longer.
        Batches of concepts are not counted, because their number of denoiser calls varies.
        """
        height, width = batch.height_width
        shape = len(batch.keys), height, width
        self._shapes.append(shape)
        self._counts_inputs = True
        try:
            if shape in self._flops or batch.concept is not None:
                yield lambda: None
                return
            self._new_shapes.add(shape)
            with FlopCounter() as counter:
                yield lambda: setattr(counter, "in_backward", True)
            self._flops[shape] = counter.flops
        finally:
            self._counts_inputs = False

    def end_step(self) -> None:
        """End a step and begin the next one; work between steps is measured by `stage`."""
        first, last, between = self._began, self._mark(), self._between
        spans, shapes, new_shapes = self._spans, self._shapes, self._new_shapes
        flops = sum(self._flops[shape] for shape in shapes) if self._flops.keys() >= set(shapes) else None
        num_images = sum(shape[0] for shape in shapes)
        self._began, self._between = last, 0.0
        self._spans, self._shapes, self._new_shapes = [], [], set()
        self.resolve()

        def figures() -> StepFigures:
            parts: defaultdict[Stage, float] = defaultdict(float)
            for name, began, ended in spans:
                parts[name] += span(began, ended)
            seconds = 0.0 if first is None else span(first, last) - between
            measured = StepFigures(seconds, parts, num_images, flops)
            self._note_if_slow(measured, new_shapes)
            return measured

        self._late = figures

    def resolve(self) -> None:
        """Collect the measurements of the last finished step."""
        if self._late is None:
            return
        figures, self._late = self._late(), None
        if self._num_steps or self._recent:  # the first step initializes
            self._num_steps += 1
            self._num_images += figures.num_images
            self._seconds += figures.seconds
            for name, seconds in figures.parts.items():
                self._parts[name] += seconds
        self._recent.append(figures)
        spent = StepSeconds(figures.seconds, figures.parts.get("waiting for data", 0.0))
        for warning in filter(None, (self._watch.add(spent), self._reserved.add_step())):
            with tqdm.external_write_mode():
                logger.warning("%s", warning)

    def _mark(self) -> Any:
        """Return the current time on the clock of the device, which the host may be a step ahead of."""
        return self._mark_on_gpu() if self.device.type == "cuda" else self.clock()

    def _mark_on_gpu(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    # Reporting

    @property
    def last(self) -> StepFigures | None:
        """The latest complete step."""
        return self._recent[-1] if self._recent else None

    def chart_values(self) -> dict[str, float]:
        """The values of the last measured step by their chart names; empty before the first."""
        if (figures := self.last) is None or figures.seconds <= 0:
            return {}
        values = {
            "speed/seconds_per_step": figures.seconds,
            "speed/images_per_second": figures.num_images * self.num_processes / figures.seconds,
        }
        if figures.flops:
            values["speed/tflops_per_second"] = figures.flops / figures.seconds / 1e12
            if self.peak is not None:
                values["speed/mfu"] = figures.flops / figures.seconds / self.peak
        for name in IN_STEP:
            values[f"speed/share_{name.replace(' ', '_')}"] = figures.parts.get(name, 0.0) / figures.seconds
        return values

    def summary(self) -> str | None:
        """Return a sentence about all steps but the first; None without a second step."""
        self.resolve()
        if not self._num_steps or self._seconds <= 0:
            return None
        shares = [f"{name} {100 * self._parts[name] / self._seconds:.0f} %" for name in IN_STEP]
        overhead = self._seconds - sum(self._parts[name] for name in IN_STEP)
        text = (
            f"a step took {self._seconds / self._num_steps:.3g} s ({', '.join(shares)}, the rest "
            f"{100 * max(0.0, overhead) / self._seconds:.0f} %), "
            f"{self._num_images * self.num_processes / self._seconds:.3g} pictures/s"
        )
        recent = [figures for figures in self._recent if figures.flops]
        if recent:
            speed = median(figures.flops / figures.seconds for figures in recent if figures.flops)
            text += f", {speed / 1e12:.3g} TFLOP/s"
            if self.peak is not None:
                text += f" on each GPU, {100 * speed / self.peak:.0f} % of {self.peak / 1e12:.0f} (MFU)"
        self.start_epoch()
        lowest, highest = min(self._num_inputs, default=0), max(self._num_inputs, default=0)
        if highest > 1:
            count = f"{lowest} to {highest}" if lowest < highest else highest
            text += f"; the denoiser's inputs had {count} shapes in an epoch"
        total_seconds = self._seconds + sum(self._parts[name] for name in BETWEEN)
        between = [
            f"{name} {self._parts[name]:.1f} s ({100 * self._parts[name] / total_seconds:.0f} % of the time)"
            for name in BETWEEN
            if self._parts[name] >= 0.05
        ]
        return text + (f"; besides, {', '.join(between)}" if between else "")

    def _note_if_slow(self, figures: StepFigures, new_shapes: set[BatchShape]) -> None:
        """Log a step that took much longer than the median, with the cause if known."""
        if len(self._recent) < NUM_KNOWN or figures.flops is None:  # its typical duration is unknown
            return
        typical_seconds = median(earlier.seconds for earlier in self._recent)
        extra = figures.seconds - typical_seconds
        if figures.seconds < SLOW * typical_seconds or extra < LEAST_EXTRA_S:
            return
        now = self.clock()
        if self._noted_at is not None and now - self._noted_at < QUIET_S:
            return
        self._noted_at = now
        pressure = measure_pressure(self.device)  # read only here: torch builds a large table for it
        faults = {name: count - self._pressure[name] for name, count in pressure.items()}
        self._pressure = pressure
        waiting = figures.parts.get("waiting for data", 0.0)
        typical_waiting = median(earlier.parts.get("waiting for data", 0.0) for earlier in self._recent)
        typical_flops = median(earlier.flops or 0.0 for earlier in self._recent)
        if waiting - typical_waiting > extra / 2:
            reason = f"waited {waiting:.2f} s for images"
        elif new_shapes:
            reason = "first batch of " + ", ".join(f"{n} of {w}x{h}" for n, h, w in sorted(new_shapes))
        elif faults["retries"]:
            reason = f"GPU memory was full and was defragmented {faults['retries']} times"
        elif faults["pages"] > MANY_PAGES:
            reason = f"main memory was full: {faults['pages']} pages were swapped in from disk"
        elif (figures.flops or 0.0) > SLOW * typical_flops > 0:
            reason = "larger or more images than usual"
        elif self._noted_unknown:  # once is enough: a busy machine has one every minute
            return
        else:
            reason, self._noted_unknown = "cause unknown", True
        with tqdm.external_write_mode():
            logger.info("slow step: %.2f s (typical: %.2f s), %s", figures.seconds, typical_seconds, reason)


def span(began: Any, ended: Any) -> float:
    """Return the seconds between two marks of the host's or the GPU's clock."""
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def measure_pressure(device: torch.device) -> dict[str, int]:
    """Count memory shortages: pages read back from disk, and retried GPU allocations."""
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0
    return {"pages": num_pages_read_back(), "retries": retries}


def num_pages_read_back() -> int:
    """Return this process's number of pages read back from disk; 0 on systems without it, such as Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
