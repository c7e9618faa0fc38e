"""Measuring steps: durations, operations, noise, and why a run slows down."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from library.base.randomness import generator_for
from library.diffusion.flow import FlowMatching
from library.diffusion.objective import build_ddpm
from library.diffusion.timesteps import LevelSampler
from library.memory.blocks import plain, recompute
from library.memory.frozen import freeze_layer, frozen_layers, multiply_codes
from library.memory.planner import measured
from library.memory.planner.counter import FlopCounter
from library.memory.planner.gpus import CARDS
from library.memory.planner.measured import measure_peak_flops
from library.options.training.noise import NoiseOptions
from library.training.evaluation.validation import ValidationSchedule
from library.training.evaluation.validation_loss import (
    Difference,
    corrupt_each,
    estimate_paired_difference,
    noise_levels,
)
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
from library.training.reporting.step_times import IN_STEP, StepTimes
from library.types import Batch
from tests.unit.data.builders import options_of
from tests.weight_formats import CODECS

CPU = torch.device("cpu")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch_of(num_images: int, height: int = 64, width: int = 96) -> Batch:
    ones = torch.ones(num_images)
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * num_images)
    names = ["a"] * num_images
    return Batch(names, names, None, None, None, ones, None, sizes, [{}] * num_images)


def take_step(
    times: StepTimes,
    clock: Clock,
    data: float = 0.1,
    batch: Batch | None = None,
    work: Callable[[], None] = lambda: None,
    more: float = 0.0,
) -> None:
    """0.2 s forward, 0.3 s backward, 0.05 s optimizer, 0.05 s of overhead."""
    with times.stage("waiting for data"):
        clock.now += data
    with times.counted(batch or batch_of(2)) as turn_back:
        with times.stage("forward"):
            work()
            clock.now += 0.2 + more
        turn_back()
        with times.stage("backward"):
            clock.now += 0.3
    with times.stage("optimizer"):
        clock.now += 0.05
    clock.now += 0.05
    times.end_step()


def product() -> None:
    torch.ones(30, 20) @ torch.ones(20, 50)  # 60,000 operations


def test_the_time_of_steps_is_broken_down_and_time_between_steps_is_separate():
    clock = Clock()
    times = StepTimes(clock=clock, num_processes=3, peak=1e6)
    times.start()
    clock.now += 7  # the first step does one-time work
    take_step(times, clock, work=product)
    assert times.summary() is None
    for _ in range(5):
        take_step(times, clock, work=product)
        with times.stage("validation"):
            clock.now += 2
        with times.stage("saving"):
            clock.now += 0.5
    summary = times.summary()
    assert summary is not None
    assert "a step took 0.7 s" in summary and "8.57 pictures/s" in summary  # three processes with two images each
    assert "waiting for data 14 %, copying 0 %, forward 29 %, backward 43 %, optimizer 7 %, the rest 7 %" in summary
    between = "validation 10.0 s (63 % of the time), saving 2.5 s (16 % of the time)"
    assert between in summary and "previews" not in summary
    assert "9 % of 0 (MFU)" in summary  # 60,000 in 0.7 s, of a million
    values = times.chart_values()
    assert values["speed/seconds_per_step"] == pytest.approx(0.7)
    assert values["speed/images_per_second"] == pytest.approx(6 / 0.7)
    assert values["speed/tflops_per_second"] == pytest.approx(6e4 / 0.7 / 1e12)
    assert values["speed/mfu"] == pytest.approx(6e4 / 0.7 / 1e6)
    shares = [values[f"speed/share_{name.replace(' ', '_')}"] for name in IN_STEP]
    assert shares == pytest.approx([1 / 7, 0, 2 / 7, 3 / 7, 0.5 / 7])


def test_the_shapes_of_the_denoisers_inputs_are_counted_in_each_epoch():
    clock, denoiser = Clock(), nn.Bilinear(3, 4, 5)
    times = StepTimes(clock=clock)
    handle = times.watch_inputs(denoiser)
    times.start()
    for lengths in ((7, 9, 7, 8), (9, 9, 8, 8)):
        times.start_epoch()
        for length in lengths:
            take_step(
                times, clock, work=lambda length=length: denoiser(torch.ones(length, 3), input2=torch.ones(length, 4))
            )
            denoiser(torch.ones(1, 3), torch.ones(1, 4))  # a preview
    summary = times.summary()
    assert summary is not None and summary.endswith("; the denoiser's inputs had 2 to 3 shapes in an epoch")
    assert times.summary() == summary
    handle.remove()
    assert not denoiser._forward_pre_hooks


def test_the_batches_of_a_step_add_up_and_operations_are_counted_once_per_shape():
    clock, calls = Clock(), []
    times = StepTimes(clock=clock)
    times.start()

    def work() -> None:
        calls.append(1)
        product()

    for _ in range(4):
        with times.counted(batch_of(1, 32, 32)):
            work()
        take_step(times, clock, work=work)
    times.resolve()
    assert times.last is not None and times.last.num_images == 3
    assert times.last.flops == 2 * 60_000 and len(calls) == 8


@pytest.mark.parametrize("runner", [plain, recompute])
def test_operations_match_the_formula_with_and_without_recomputing(runner):
    """Frozen layers compute only the gradient of their input; the input of the first has none."""
    first, second, third = nn.Linear(40, 24), nn.Linear(24, 56), nn.Linear(56, 8)
    for layer in (first, third):
        layer.requires_grad_(False)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), FlopCounter() as counter:
        first(x)
    assert counter.flops == 0  # computation without gradients is not part of the step
    with FlopCounter() as counter:
        hidden = first(x).requires_grad_()
        loss = third(runner(second, hidden)).square().sum()
        counter.in_backward = True
        loss.backward()
    forward = 2 * 6 * (40 * 24 + 24 * 56 + 56 * 8)
    backward = 2 * 6 * (56 * 8 + 2 * 24 * 56)
    assert counter.flops == forward + backward


@pytest.mark.parametrize("runner", [plain, recompute])
@pytest.mark.parametrize(("form", "is_multiplied"), [("bf16", False), ("int8", False), ("int8", True), ("fp8", True)])
def test_operations_with_encoded_weights_match_plain_weights(form: str, is_multiplied: bool, runner: Any) -> None:
    """Their products run inside a custom autograd function, where no gradients are recorded."""
    layer = nn.Linear(64, 32).requires_grad_(False)
    freeze_layer(CODECS[form], layer)
    if is_multiplied:
        assert multiply_codes(frozen_layers(layer)) == 1
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(6)).requires_grad_()
    with torch.no_grad(), FlopCounter() as counter:
        layer(x)
    assert counter.flops == 0
    with FlopCounter() as counter:
        loss = runner(layer, x).square().sum()
        assert counter.flops == 2 * 20 * 64 * 32
        counter.in_backward = True
        loss.backward()
    assert counter.flops == 2 * 2 * 20 * 64 * 32


def slow_run(caplog: pytest.LogCaptureFixture, **last: object) -> str:
    clock = Clock()
    times = StepTimes(clock=clock)
    times.start()
    with caplog.at_level(logging.INFO):
        for _ in range(30):
            take_step(times, clock, work=product)
        assert "where" not in caplog.text
        take_step(times, clock, **last)  # type: ignore[arg-type]
        times.resolve()
    return caplog.text


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"data": 4.0}, "slow step: 4.60 s (typical: 0.70 s), waited 4.00 s for images"),
        ({"batch": batch_of(2, 512, 128), "more": 1.0}, "first batch of 2 of 128x512"),
        ({"more": 1.0}, "slow step: 1.70 s (typical: 0.70 s), cause unknown"),
    ],
)
def test_a_slow_step_is_logged_with_its_reason(caplog, last, reason):
    assert reason in slow_run(caplog, **last)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"retries": 3}, "GPU memory was full and was defragmented 3 times"),
        ({"pages": 9000}, "main memory was full: 9000 pages were swapped in from disk"),
    ],
)
def test_a_memory_shortage_is_a_reason(caplog, monkeypatch, faults, reason):
    count = {"pages": 0, "retries": 0}
    monkeypatch.setattr("library.training.reporting.step_times.measure_pressure", lambda device: dict(count))
    assert reason in slow_run(caplog, more=1.0, work=lambda: count.update(faults))


@pytest.mark.parametrize(("cause", "most"), [({"data": 2.0}, None), ({"more": 2.0}, 1)])
def test_slow_steps_are_logged_once_a_minute_or_once_without_a_cause(caplog, cause, most):
    clock = Clock()
    times = StepTimes(clock=clock)
    times.start()
    with caplog.at_level(logging.INFO):
        for number in range(120):
            take_step(times, clock, **(cause if number % 3 == 2 and number > 40 else {}))
    num_notes = caplog.text.count("slow step")
    assert num_notes == most if most else 1 < num_notes <= 1 + clock.now // 60


def test_peak_flops_are_known_by_gpu_name(monkeypatch):
    assert measure_peak_flops(CPU, torch.bfloat16) is None
    names = {
        "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 4070 Ti SUPER": 88e12, "NVIDIA L40S": 362e12,
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "Tesla T4": 65e12, "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4060": 30e12, "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12, "NVIDIA L40": 181e12,
        "NVIDIA RTX A4000": None, "NVIDIA A100X": None,
    }  # fmt: skip
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(measured, "benchmark_gpu", lambda *args: SimpleNamespace(flops=0.0))
        assert measure_peak_flops(torch.device("cuda"), torch.bfloat16) == (flops or 0.0)
    names = [card.name for card in CARDS]
    for place, name in enumerate(names):
        hidden = [earlier for earlier in names[:place] if f" {earlier} " in f" {name} "]
        assert not hidden, f"{name} is never reached"


# Noise levels, the noise of each image, and the standard error of a paired difference.


@pytest.mark.parametrize(
    ("low", "high", "levels"),
    [
        (None, None, (200, 400, 600, 800)),
        (0, 1000, (200, 400, 600, 800)),
        (100, 333, (146, 193, 239, 286)),
        (500, 502, (500, 501)),
        (999, 1000, (999,)),
    ],
)
def test_levels_divide_the_range_as_numpy_does(low, high, levels):
    options = replace(NoiseOptions(), min_timestep=low, max_timestep=high)
    expected = np.linspace(low or 0, 1000 if high is None else high, 6)[1:-1].astype(int)
    assert noise_levels(options) == levels == tuple(dict.fromkeys(expected.tolist()))


def test_the_error_of_a_difference_matches_a_paired_t_test():
    rng = np.random.default_rng(1)
    before, now = rng.normal(size=(2, 9, 4))
    difference = estimate_paired_difference(torch.tensor(now), torch.tensor(before), [f"picture {i}" for i in range(9)])
    differences = (now - before).mean(1)
    assert difference.mean == pytest.approx(differences.mean(), rel=1e-12)
    assert difference.standard_error == pytest.approx(
        differences.std(ddof=1) / np.sqrt(9), rel=1e-12
    )  # both are float64


def test_several_rows_of_one_image_are_one_observation():
    """Two equal rows per image carry no more information than one: only (G / (G - 1)) is unchanged."""
    rng = np.random.default_rng(2)
    before, now = (torch.tensor(values) for values in rng.normal(size=(2, 6, 4)))
    once = estimate_paired_difference(now, before, range(6))
    twice = estimate_paired_difference(now.repeat(2, 1), before.repeat(2, 1), [*range(6), *range(6)])
    assert twice.mean == pytest.approx(once.mean, rel=1e-12)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert (
        estimate_paired_difference(now.repeat(2, 1), before.repeat(2, 1), range(12)).standard_error
        < once.standard_error
    )


def test_one_image_has_no_error_and_equal_weights_no_difference():
    losses = torch.rand(1, 4, dtype=torch.float64)
    alone = estimate_paired_difference(losses, losses + 1, ["a"])
    assert alone.mean == pytest.approx(-1) and isnan(alone.standard_error) and not alone.is_clear
    same = estimate_paired_difference(losses.repeat(3, 1), losses.repeat(3, 1), "abc")
    assert (same.mean, same.standard_error) == (0.0, 0.0) and not same.is_clear
    assert Difference(-0.3, 0.1).is_clear and not Difference(0.1, 0.1).is_clear


def uniform() -> LevelSampler:
    return lambda draws: torch.rand(draws.num_samples, generator=draws.generator)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_noise_and_level_of_an_image_do_not_depend_on_its_neighbours(kind):
    options = options_of("--multires_noise_iterations 2 --ip_noise_gamma 0.1" if kind == "ddpm" else "")
    objective = (
        build_ddpm(options.noise, options.loss, predicts_velocity=False)
        if kind == "ddpm"
        else FlowMatching(options.noise, options.loss, uniform(), "noise - latent", "raw", "none")
    ).at_timestep(600)
    clean_BCHW = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def noised(places):
        return corrupt_each(objective, clean_BCHW[list(places)], [generator_for(1, "test", place) for place in places])

    together, apart = noised([0, 1, 2]), noised([2])
    assert together.timesteps_B.tolist() == [600] * 3
    assert torch.equal(together.latents_BCHW[2:], apart.latents_BCHW)
    assert torch.equal(together.noise_BCHW[2:], apart.noise_BCHW)
    assert not torch.equal(together.noise_BCHW[0], together.noise_BCHW[1])


def test_validation_is_due_by_steps_and_at_the_end_of_epochs():
    options = options_of("--validate_every_n_steps 3 --validate_every_n_epochs 2").validation
    timetable = ValidationSchedule.build(options, 10)
    assert list(timetable.due(3, None)) == ["step"] and list(timetable.due(4, 1)) == []
    assert list(timetable.due(6, 2)) == ["step", "epoch"]
    always = ValidationSchedule.build(options_of("").validation, 8)
    assert list(always.due(3, None)) == [] and list(always.due(4, 1)) == list(always.due(8, 2)) == ["epoch"]


def test_with_an_interval_in_steps_epochs_are_ignored_and_the_last_step_is_measured():
    timetable = ValidationSchedule.build(options_of("--validate_every_n_steps 3").validation, 8)
    assert [step for step in range(1, 9) if list(timetable.due(step, step // 2 if step % 2 == 0 else None))] == [
        3,
        6,
        8,
    ]
    assert list(timetable.due(6, 3)) == list(timetable.due(8, 4)) == ["step"]


# Detecting why a run slows down, with a fake clock, allocator and NVML.

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
