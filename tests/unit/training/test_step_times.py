"""The duration of steps, its breakdown, and their number of operations."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.memory.blocks import plain, recompute
from library.memory.frozen import freeze_layer, frozen_layers, multiply_codes
from library.memory.planner import measured
from library.memory.planner.counter import FlopCounter
from library.memory.planner.gpus import CARDS
from library.memory.planner.measured import measure_peak_flops
from library.training.reporting.step_times import IN_STEP, StepTimes
from library.types import Batch
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
