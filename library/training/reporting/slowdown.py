"""Warnings, each given once: steps take twice as long as at the start, or torch holds far more memory than tensors."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from library.memory.planner.gpus import GIB

NUM_BASELINE, NUM_RECENT = 100, 50  # steps to compare
SLOWDOWN = 2.0  # ratio to the baseline
CHECK_EVERY = 10  # steps; reading the machine takes milliseconds
MOST_RESERVED = 1.3  # ratio of the peak memory that torch reserves to that of tensors
FRAGMENTED = 0.1  # fraction of GPU memory; more unused memory held by torch counts as a cause
FULL = 0.02  # fraction of GPU memory; with less free, drivers may spill into system memory
MANY_PAGES = 5000  # pages read back from disk since the baseline, 20 MB
# NVML's bits. A power cap is not a cause: a busy GPU is always at its limit.
THROTTLING = {0x08: "hardware slowdown", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}


@dataclass(frozen=True)
class Machine:
    """Measurements of possible causes at one moment; those of the GPU are 0 on the CPU."""

    pages: int = 0  # read back from disk so far
    retries: int = 0  # allocations so far that first had to free cached GPU memory
    allocated_bytes: int = 0
    reserved_bytes: int = 0  # by torch's allocator
    allocated_peak: int = 0
    reserved_peak: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    throttling: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepSeconds:
    """A step's time, and its time waiting for data."""

    total: float
    waiting: float


class SlowdownWatch:
    """Compares the median of the last 50 steps with that of the first 100, without the very first step."""

    def __init__(self, read: Callable[[], Machine]) -> None:
        """`read` measures the machine."""
        self._read = read
        self._baseline: list[StepSeconds] | None = []
        self._middle = self._waiting = 0.0
        self._before = Machine()
        self._recent: deque[StepSeconds] = deque(maxlen=NUM_RECENT)
        self._num_steps = 0
        self._is_over = False

    def add(self, step: StepSeconds) -> str | None:
        """Add a step. Return the warning once, when the run has become slow."""
        self._num_steps += 1
        if self._is_over or self._num_steps == 1:  # the first step compiles, tunes and allocates
            return None
        if self._baseline is not None:
            self._baseline.append(step)
            if len(self._baseline) == NUM_BASELINE:
                self._middle = median(s.total for s in self._baseline)
                self._waiting = median(s.waiting for s in self._baseline)
                self._before, self._baseline = self._read(), None
            return None
        self._recent.append(step)
        if len(self._recent) < NUM_RECENT or self._num_steps % CHECK_EVERY:
            return None
        recent_seconds = median(s.total for s in self._recent)
        if recent_seconds < SLOWDOWN * self._middle:
            return None
        self._is_over = True
        waiting = median(s.waiting for s in self._recent) - self._waiting
        causes = [*find_causes(self._before, self._read())]
        if waiting > (recent_seconds - self._middle) / 2:
            causes.insert(
                0, f"each waits {waiting:.2f} s longer for images: disk, network or loader workers are slower"
            )
        return (
            f"the last {NUM_RECENT} steps took {recent_seconds:.2f} s each, the first {NUM_BASELINE} "
            f"{self._middle:.2f} s: "
            + ("; ".join(causes) or "no cause found in data loading, memory, swap and GPU clocks")
        )


def find_causes(before: Machine, now: Machine) -> Iterator[str]:
    """Name the changes on the machine that explain slower steps."""
    if now.retries > before.retries:
        yield (
            f"GPU memory ran full {now.retries - before.retries} times and cached memory was freed; see docs/memory.md "
            "for options that need less"
        )
    held = (now.reserved_bytes - now.allocated_bytes) - (before.reserved_bytes - before.allocated_bytes)
    if now.total_bytes and held > FRAGMENTED * now.total_bytes:
        yield f"torch holds {held / GIB:.1f} GiB more GPU memory than it uses (fragmentation)"
    if now.total_bytes and now.free_bytes < FULL * now.total_bytes <= before.free_bytes:
        yield (
            f"GPU memory is full ({now.free_bytes / GIB:.1f} of {now.total_bytes / GIB:.1f} GiB free), and drivers of "
            "Windows then move memory into system RAM: close other programs that use the GPU"
        )
    if now.throttling:
        yield f"the GPU lowers its clock ({', '.join(now.throttling)}): check cooling and power supply"
    if now.pages - before.pages > MANY_PAGES:
        yield f"system memory ran full: {now.pages - before.pages} pages were swapped in from disk"


class ReservedWatch:
    """Compares the peak memory that torch takes from a GPU with that of its tensors, from step 50 on."""

    def __init__(self, read: Callable[[], Machine]) -> None:
        """`read` measures the machine."""
        self._read = read
        self._num_steps = 0
        self._is_over = False

    def add_step(self) -> str | None:
        """Count a step. Return the warning once, when memory is wasted that the run could use."""
        self._num_steps += 1
        if self._is_over or self._num_steps % NUM_RECENT:
            return None
        warning = explain_reserved(self._read())
        self._is_over = warning is not None
        return warning


def explain_reserved(machine: Machine) -> str | None:
    """Return a warning if torch reserves far more than its tensors take, on a GPU that has too little memory for it.

    On a GPU with memory to spare torch keeps what it once had, which does no harm.
    """
    is_full = machine.retries > 0 or machine.free_bytes < FULL * machine.total_bytes
    if not is_full or machine.reserved_peak <= MOST_RESERVED * machine.allocated_peak:
        return None
    return (
        f"torch took {machine.reserved_peak / GIB:.1f} GiB from the GPU for at most {machine.allocated_peak / GIB:.1f} "
        f"GiB of tensors, and the GPU is full (cached memory was freed {machine.retries} times): a larger "
        "--bucket_reso_steps gives fewer sizes of images, and docs/memory.md has options that need less"
    )


def read_machine(device: torch.device, num_pages: Callable[[], int]) -> Machine:
    """Measure this machine; `num_pages` returns the pages read back from disk so far."""
    if device.type != "cuda":
        return Machine(num_pages())
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return Machine(
        pages=num_pages(),
        retries=torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        allocated_bytes=torch.cuda.memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        allocated_peak=torch.cuda.max_memory_allocated(device),
        reserved_peak=torch.cuda.max_memory_reserved(device),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        throttling=read_throttling(str(torch.cuda.get_device_properties(device).uuid)),
    )


def read_throttling(uuid: str) -> tuple[str, ...]:
    """Return NVML's reasons for the GPU's current throttling; () without any, or without the package nvidia-ml-py."""
    try:
        import pynvml
    except Exception:  # missing or broken
        return ()
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        # By UUID, because CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:
        return ()
    return tuple(dict.fromkeys(name for bit, name in THROTTLING.items() if reasons & bit))
