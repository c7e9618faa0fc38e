"""The learning rate of every schedule at every step matches its closed form."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from library.options.training.optimizer import OptimizerOptions, ScheduleOptions
from library.training.optimization.lr_schedules import (
    Schedule,
    base_rates,
    build_schedule,
    follow_rates,
    resolve_num_steps,
)
from library.training.optimization.optimizers import BuiltOptimizer, build_optimizer

RATES = (0.02, 0.004)
T = 40
WARMUP = 8


def optimizer_of(name: str = "SGD", args: list[str] | None = None, rate: float = RATES[0]) -> BuiltOptimizer:
    weights = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4) * scale) for scale in (1.0, 0.5)]
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(weights, RATES, strict=True)]
    return build_optimizer(OptimizerOptions(name, learning_rate=rate, optimizer_args=args), groups)


def step(built: BuiltOptimizer, schedule: Schedule) -> None:
    for group in built.optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach().clone()
    built.optimizer.step()
    schedule.step()
    built.optimizer.zero_grad()


def curve(options: ScheduleOptions, steps: int = T) -> list[float]:
    """Return the first group's rate in each step as a share of its configured rate; the second must match."""
    built = optimizer_of()
    schedule = build_schedule(options, built, T)
    shares = []
    for _ in range(steps):
        used = [float(group["lr"]) for group in built.optimizer.param_groups]
        assert used == schedule.get_last_lr()
        shares.append(used[0] / RATES[0])
        assert used[1] / RATES[1] == pytest.approx(shares[-1], abs=1e-12)
        step(built, schedule)
    return shares


def after_warmup(s: int, decay: Callable[[float], float], warmup: int = WARMUP) -> float:
    """Return a linear rise from 0, then `decay` of the share of the remaining run."""
    return s / warmup if s < warmup else decay((s - warmup) / (T - warmup))


def rex(s: int, last: float, alpha: float, beta: float) -> float:
    """Rise from `last` to 1, then fall back to it by musubi-tuner's formula."""
    if s < WARMUP:
        return last + (1 - last) * s / WARMUP
    z = (T - s) / (T - WARMUP)
    return last + (1 - last) * z / (alpha + beta * z)


def inverse_sqrt(s: int, warmup: int, timescale: int) -> float:
    return s / warmup if s < warmup else 1 / math.sqrt((s + timescale - warmup) / timescale)


def stable_decay(s: int) -> float:
    stable, decay, least = 20, 12, 0.1
    if s < WARMUP:
        return least + (1 - least) * s / WARMUP
    if s < WARMUP + stable:
        return 1.0
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (s - WARMUP - stable) / decay))


def polynomial(s: int, power: float) -> float:
    end = 1e-7 / RATES[0]
    return after_warmup(s, lambda u: (1 - end) * (1 - u) ** power + end)


CURVES: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("constant", {"lr_warmup_steps": 0}, lambda s: 1.0),
    ("constant_with_warmup", {}, lambda s: min(1.0, s / WARMUP)),
    ("linear", {}, lambda s: after_warmup(s, lambda u: 1 - u)),
    ("cosine", {}, lambda s: after_warmup(s, lambda u: 0.5 * (1 + math.cos(math.pi * u)))),
    (
        "cosine_with_restarts",
        {"lr_scheduler_num_cycles": 3},
        lambda s: after_warmup(s, lambda u: 0.5 * (1 + math.cos(math.pi * ((3 * u) % 1)))),
    ),
    ("polynomial", {"lr_scheduler_power": 2.5}, lambda s: polynomial(s, 2.5)),
    ("polynomial", {}, lambda s: polynomial(s, 1.0)),
    ("inverse_sqrt", {"lr_scheduler_timescale": 5}, lambda s: inverse_sqrt(s, WARMUP, 5)),
    ("inverse_sqrt", {}, lambda s: inverse_sqrt(s, WARMUP, WARMUP)),
    ("inverse_sqrt", {"lr_warmup_steps": 0}, lambda s: 1 / math.sqrt((s + 10_000) / 10_000)),
    (
        "cosine_with_min_lr",
        {"lr_scheduler_min_lr_ratio": 0.2, "lr_scheduler_num_cycles": 3},
        lambda s: after_warmup(s, lambda u: 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 3 * u))),
    ),
    ("warmup_stable_decay", {"lr_decay_steps": 0.3, "lr_scheduler_min_lr_ratio": 0.1}, stable_decay),
    ("rex", {}, lambda s: rex(s, 0.01, 0.1, 0.9)),
    (
        "rex",
        {"lr_scheduler_min_lr_ratio": 0.2, "lr_scheduler_args": ["rex_alpha=0.5", "rex_beta=0.5"]},
        lambda s: rex(s, 0.2, 0.5, 0.5),
    ),
    ("rex", {"lr_warmup_steps": 0}, lambda s: 0.01 + 0.99 * (1 - s / T) / (0.1 + 0.9 * (1 - s / T))),
    (
        "piecewise_constant",
        {"lr_warmup_steps": 0, "lr_scheduler_args": ["step_rules='1:10,0.5:25,0.1'"]},
        lambda s: 1.0 if s < 10 else 0.5 if s < 25 else 0.1,
    ),
]


@pytest.mark.parametrize(("name", "settings", "share"), CURVES, ids=lambda value: value if type(value) is str else "")
def test_each_schedule_follows_its_formula(name: str, settings: dict[str, Any], share: Callable[[int], float]) -> None:
    options = ScheduleOptions(lr_scheduler=name, **{"lr_warmup_steps": WARMUP, **settings})
    assert curve(options) == pytest.approx([share(s) for s in range(T)], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "settings"), [("linear", {}), ("cosine", {}), ("polynomial", {"lr_scheduler_power": 2.0})]
)
def test_the_last_step_of_the_run_ends_the_curve(name: str, settings: dict[str, Any]) -> None:
    shares = curve(ScheduleOptions(lr_scheduler=name, **settings), steps=T + 1)
    assert 0 < shares[T - 1] < 0.03
    assert shares[T] == pytest.approx(0, abs=1e-5)


def test_arguments_are_passed_to_the_schedule_function() -> None:
    shares = curve(ScheduleOptions(lr_scheduler="polynomial", lr_scheduler_args=["lr_end=0.005"]))
    assert shares[20] == pytest.approx(0.5 * (1 + 0.25))
    shares = curve(
        ScheduleOptions(
            lr_scheduler="warmup_stable_decay", lr_decay_steps=20, lr_scheduler_args=["decay_type='linear'"]
        )
    )
    assert shares[30] == pytest.approx(0.5)
    shares = curve(ScheduleOptions(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=["min_lr=0.01"]))
    assert shares[20] == pytest.approx(0.75)


def test_warmup_counts_steps_from_1_and_shares_below() -> None:
    assert resolve_num_steps(100, 1000, "--lr_warmup_steps") == 100
    assert resolve_num_steps(0.1, 1000, "--lr_warmup_steps") == 100
    assert resolve_num_steps(100.0, 1000, "--lr_warmup_steps") == 100
    assert resolve_num_steps(1, 1000, "--lr_warmup_steps") == 1
    assert resolve_num_steps(0.0, 1000, "--lr_warmup_steps") == 0
    with pytest.raises(ValueError, match=r"--lr_warmup_steps is 2\.5; use a whole number"):
        resolve_num_steps(2.5, 1000, "--lr_warmup_steps")
    with pytest.raises(ValueError, match="must not be negative"):
        resolve_num_steps(-1, 1000, "--lr_warmup_steps")


def test_warmup_as_a_share_equals_warmup_in_steps() -> None:
    by_share = curve(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=0.25))
    assert by_share == curve(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=10))


def test_a_restored_schedule_continues_where_it_was() -> None:
    options = ScheduleOptions(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2, lr_warmup_steps=5)
    uninterrupted = curve(options)
    first = optimizer_of()
    schedule = build_schedule(options, first, T)
    for _ in range(17):
        step(first, schedule)
    second = optimizer_of()
    restored = build_schedule(options, second, T)
    restored.load_state_dict(schedule.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for s in range(17, T):
        assert second.optimizer.param_groups[0]["lr"] / RATES[0] == pytest.approx(uninterrupted[s], abs=1e-12)
        step(second, restored)


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["CosineAnnealingLR", "torch.optim.lr_scheduler.CosineAnnealingLR"])
def test_a_scheduler_class_gets_its_arguments_and_overrides_the_name(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    shares = curve(
        ScheduleOptions("linear", lr_scheduler_type=path, lr_scheduler_args=["T_max=40", "eta_min=0.0"]), steps=30
    )
    assert shares == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 40)) for s in range(30)], abs=1e-9)
    assert "--lr_scheduler linear has no effect" in caplog.text


def test_a_scheduler_class_is_built_as_configured() -> None:
    options = ScheduleOptions(lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=["T_max=7"])
    schedule = build_schedule(options, optimizer_of(), T)
    assert type(schedule) is CosineAnnealingLR
    assert schedule.T_max == 7


class Ramp(LambdaLR):
    """A schedule of a user: warm-up, then a fall to 0 at the end of the run."""

    def __init__(self, optimizer: Optimizer, num_warmup_steps: int = 5, num_training_steps: int | None = None) -> None:
        self.lengths = num_warmup_steps, num_training_steps
        super().__init__(optimizer, lambda step: 1.0)


@pytest.mark.parametrize(
    ("values", "lengths"),
    [
        ({"lr_warmup_steps": 0.1}, (3, 30)),
        ({"lr_warmup_steps": 7}, (7, 30)),
        ({}, (5, 30)),
        ({"lr_scheduler_args": ["num_warmup_steps=2", "num_training_steps=9"]}, (2, 9)),
    ],
)
def test_a_class_that_names_warmup_and_length_gets_those_of_the_run(
    values: dict[str, Any], lengths: tuple[int, int]
) -> None:
    options = ScheduleOptions(lr_scheduler_type=f"{__name__}.Ramp", **values)
    schedule = build_schedule(options, optimizer_of(), 30)
    assert isinstance(schedule, Ramp) and schedule.lengths == lengths


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_decay_steps": 5}, "--lr_decay_steps has no effect with --lr_scheduler cosine"),
        ({"lr_scheduler_power": 2.0}, "--lr_scheduler_power has no effect"),
        ({"lr_scheduler_num_cycles": 2}, "belongs to cosine_with_restarts"),
        ({"lr_scheduler_timescale": 2}, "--lr_scheduler_timescale has no effect"),
        ({"lr_scheduler_min_lr_ratio": 0.1}, "--lr_scheduler_min_lr_ratio has no effect"),
        ({"lr_warmup_steps": 50}, "the run ends after 40"),
    ],
)
def test_settings_without_effect_are_warned_about(
    settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_schedule(ScheduleOptions(lr_scheduler="cosine"), optimizer_of(), T)
    assert caplog.text == ""
    build_schedule(ScheduleOptions(lr_scheduler="cosine", **settings), optimizer_of(), T)
    assert message in caplog.text


# --- optimizers that need no schedule -------------------------------------------------------------------------------


def test_adafactor_reports_its_own_rates(caplog: pytest.LogCaptureFixture) -> None:
    built = optimizer_of("Adafactor", ["scale_parameter=False"])
    schedule = build_schedule(ScheduleOptions(lr_scheduler="adafactor:0.125"), built, T)
    assert schedule.get_last_lr() == [0.125, 0.125]
    assert "no effect" not in "".join(r.getMessage() for r in caplog.records if "lr_schedules" in r.name)
    for s in range(1, 4):
        step(built, schedule)
        assert schedule.get_last_lr() == pytest.approx([min(1e-2, 1 / math.sqrt(s))] * 2)
    warming = optimizer_of("Adafactor", ["scale_parameter=False", "warmup_init=True"])
    schedule = build_schedule(ScheduleOptions(), warming, T)
    for _ in range(3):
        step(warming, schedule)
    assert schedule.get_last_lr() == pytest.approx([3e-6, 3e-6])


def test_reporting_does_not_change_adafactors_rates() -> None:
    plain, shown = optimizer_of("Adafactor"), optimizer_of("Adafactor")
    schedule = build_schedule(ScheduleOptions(), shown, T)
    for _ in range(4):
        step(shown, schedule)
        for p in (p for group in plain.optimizer.param_groups for p in group["params"]):
            p.grad = p.detach().clone()
        plain.optimizer.step()
    weights_shown, weights_plain = (built.optimizer.param_groups[0]["params"][0] for built in (shown, plain))
    assert torch.equal(weights_shown, weights_plain)


def test_adafactor_with_relative_steps_refuses_a_warmup_and_drops_other_schedules(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ValueError, match="use warmup_init=True in --optimizer_args"):
        build_schedule(ScheduleOptions(lr_warmup_steps=10), optimizer_of("Adafactor"), T)
    with pytest.raises(ValueError, match="'fast' is not a rate"):
        build_schedule(ScheduleOptions(lr_scheduler="adafactor:fast"), optimizer_of("Adafactor"), T)
    build_schedule(ScheduleOptions(lr_scheduler="cosine"), optimizer_of("Adafactor"), T)
    assert "--lr_scheduler cosine has no effect" in caplog.text


def test_adafactor_with_configured_rates_accepts_a_schedule() -> None:
    built = optimizer_of("Adafactor", ["relative_step=False"])
    schedule = build_schedule(ScheduleOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=4), built, T)
    step(built, schedule)
    assert schedule.get_last_lr() == pytest.approx([RATES[0] / 4, RATES[1] / 4])


def test_schedule_free_optimizers_get_a_constant_schedule(caplog: pytest.LogCaptureFixture) -> None:
    built = optimizer_of("AdamWScheduleFree")
    schedule = build_schedule(ScheduleOptions(), built, T)
    assert caplog.text == ""
    step(built, schedule)
    assert schedule.get_last_lr() == list(RATES)
    schedule.load_state_dict(schedule.state_dict())
    build_schedule(ScheduleOptions(lr_scheduler="cosine", lr_warmup_steps=5), built, T)
    assert "AdamWScheduleFree needs no schedule: --lr_scheduler cosine" in caplog.text


# --- resuming with other rates and another length ---


def rates_after_resume(
    options: ScheduleOptions, other: ScheduleOptions, length: int, factor: float, steps: int = 10, more: int = 5
) -> list[float]:
    """Return the first group's rates after resuming a run of T at `steps` with `length` and rates times `factor`."""
    first = optimizer_of()
    schedule = build_schedule(options, first, T)
    for _ in range(steps):
        step(first, schedule)
    built = optimizer_of()
    for group in built.optimizer.param_groups:
        group["lr"] *= factor
    resumed_schedule = build_schedule(other, built, length)
    rates = base_rates(built.optimizer)
    built.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed_schedule.load_state_dict(schedule.state_dict())
    follow_rates(resumed_schedule, built.optimizer, rates)
    rates_used = []
    for _ in range(more):
        rates_used.append(built.optimizer.param_groups[0]["lr"])
        step(built, resumed_schedule)
        assert built.optimizer.param_groups[1]["lr"] == pytest.approx(built.optimizer.param_groups[0]["lr"] / 5)
    return rates_used


COSINE = ScheduleOptions(lr_scheduler="cosine")


def test_without_changes_rates_are_bit_identical() -> None:
    built = optimizer_of()
    schedule, uninterrupted = build_schedule(COSINE, built, T), []
    for _ in range(15):
        uninterrupted.append(built.optimizer.param_groups[0]["lr"])
        step(built, schedule)
    assert rates_after_resume(COSINE, COSINE, T, 1.0) == uninterrupted[10:]


def test_another_rate_takes_effect_from_the_next_step_on() -> None:
    expected = [0.5 * RATES[0] * 0.5 * (1 + math.cos(math.pi * s / T)) for s in range(10, 15)]
    assert rates_after_resume(COSINE, COSINE, T, 0.5) == pytest.approx(expected, rel=1e-12)
    assert rates_after_resume(ScheduleOptions(), ScheduleOptions(), T, 0.25) == [RATES[0] / 4] * 5


def test_the_curve_of_another_length_takes_effect_from_the_next_step_on() -> None:
    expected = [RATES[0] * 0.5 * (1 + math.cos(math.pi * s / (3 * T))) for s in range(10, 15)]
    assert rates_after_resume(COSINE, COSINE, 3 * T, 1.0) == pytest.approx(expected, rel=1e-12)


def test_a_torch_scheduler_is_scaled_at_its_position() -> None:
    options = ScheduleOptions(lr_scheduler_type="StepLR", lr_scheduler_args=["step_size=12", "gamma=0.1"])
    expected = [RATES[0] * 3, RATES[0] * 3, *[RATES[0] * 0.3] * 3]
    assert rates_after_resume(options, options, T, 3.0) == pytest.approx(expected, rel=1e-12)


def test_a_rate_of_0_can_be_raised() -> None:
    built = optimizer_of()
    rates = base_rates(built.optimizer)
    schedule = build_schedule(COSINE, built, T)
    for group in built.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.0
    follow_rates(schedule, built.optimizer, rates)
    assert [group["lr"] for group in built.optimizer.param_groups] == list(RATES) == schedule.get_last_lr()


def test_adafactor_keeps_its_own_rates_and_schedule_free_optimizers_use_the_new() -> None:
    relative = optimizer_of("Adafactor")
    schedule = build_schedule(ScheduleOptions(lr_scheduler="adafactor:0.1"), relative, T)
    follow_rates(schedule, relative.optimizer, [0.5, 0.5])
    assert [group["lr"] for group in relative.optimizer.param_groups] == [0.1, 0.1]
    free = optimizer_of("AdamWScheduleFree")
    follow_rates(build_schedule(ScheduleOptions(), free, T), free.optimizer, [0.5, 0.25])
    assert [group["lr"] for group in free.optimizer.param_groups] == [0.5, 0.25]
