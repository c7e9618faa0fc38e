"""Detecting why a run slows down, with a fake clock, allocator and NVML."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from library.training.reporting.slowdown import (
    GIB,
    NUM_BASELINE,
    NUM_RECENT,
    Machine,
    ReservedWatch,
    SlowdownWatch,
    StepSeconds,
    read_throttling,
)

AT_FIRST = Machine(
    pages=100, retries=2, allocated_bytes=9 * GIB, reserved_bytes=10 * GIB, free_bytes=2 * GIB, total_bytes=12 * GIB
)


def warnings_of(seconds: list[float], waiting: list[float] | None = None, **later: Any) -> list[tuple[int, str]]:
    """Return (step, warning) of a run whose machine changes after its first hundred steps."""
    states = iter([AT_FIRST, replace(AT_FIRST, **later)])
    watch = SlowdownWatch(lambda: next(states))
    waits = waiting or [0.1] * len(seconds)
    warnings = [watch.add(StepSeconds(*pair)) for pair in zip(seconds, waits, strict=True)]
    return [(step, text) for step, text in enumerate(warnings, 1) if text is not None]


SLOW = [30.0, *[1.0] * NUM_BASELINE, *[1.0] * 100, *[2.5] * 100]  # the first one compiles


@pytest.mark.parametrize(
    ("later", "cause"),
    [
        ({"retries": 9}, "GPU memory ran full 7 times and cached memory was freed"),
        ({"reserved_bytes": 12 * GIB}, "torch holds 2.0 GiB more GPU memory than it uses (fragmentation)"),
        ({"free_bytes": GIB // 10}, "GPU memory is full (0.1 of 12.0 GiB free)"),
        ({"throttling": ("temperature",)}, "the GPU lowers its clock (temperature)"),
        ({"pages": 90_100}, "system memory ran full: 90000 pages were swapped in"),
        ({}, "no cause found"),
        ({"retries": 3, "pages": 90_100}, "for options that need less; system memory ran full"),
    ],
)
def test_a_single_warning_names_the_cause(later: dict[str, Any], cause: str) -> None:
    ((step, text),) = warnings_of(SLOW, **later)
    assert text.startswith("the last 50 steps took 2.50 s each, the first 100 1.00 s: ") and cause in text
    assert 201 + NUM_RECENT // 2 <= step <= 201 + NUM_RECENT // 2 + 10


@pytest.mark.parametrize(
    ("change", "is_warned"),
    [
        ({"retries": 1}, True),
        ({"free_bytes": GIB // 10}, True),
        ({}, False),
        ({"retries": 1, "reserved_peak": 6 * GIB}, False),
    ],
)
def test_memory_that_torch_holds_on_a_full_gpu_is_warned_about_once(change: dict[str, Any], is_warned: bool) -> None:
    state = replace(AT_FIRST, retries=0, allocated_peak=5 * GIB, reserved_peak=8 * GIB)
    watch = ReservedWatch(lambda: replace(state, **change))
    warnings = [text for _ in range(200) if (text := watch.add_step()) is not None]
    assert len(warnings) == is_warned and all("8.0 GiB from the GPU for at most 5.0 GiB" in text for text in warnings)


def test_waiting_for_images_is_reported_as_a_cause() -> None:
    ((_, text),) = warnings_of(SLOW, [0.1] * 201 + [1.5] * 100)
    assert "each waits 1.40 s longer for images" in text


@pytest.mark.parametrize(
    "seconds", [[1.0] * 400, [1.0] * 201 + [1.9] * 100, [1.0] * 201 + [9.0] * 20 + [1.0] * 100, [1.0] * 90 + [5.0] * 50]
)
def test_normal_runs_are_not_warned_about(seconds: list[float]) -> None:
    assert warnings_of(seconds) == []


@pytest.mark.parametrize(
    ("reasons", "expected"), [(0x4, ()), (0x60, ("temperature",)), (0x88, ("hardware slowdown", "power brake"))]
)
def test_the_reason_for_a_low_clock_comes_from_nvml(
    reasons: int, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(
        NVMLError=ValueError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: {"GPU-12-34": reasons}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_throttling("12-34") == expected
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_throttling("12-34") == ()
