"""Steps whose results are reported late, while the next step is computed, have the same effect and reports."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.base.errors import UserError
from library.training.failures.nonfinite import NonFiniteError, NonFiniteGuard
from library.training.failures.nonfinite_trace import find_first_damage
from library.training.loop.loop import accumulate_gradients
from library.training.loop.update import Updates, skips_by_itself
from library.training.optimization.ema import WeightAverage
from library.training.reporting.step_events import StepResult
from library.training.run_parts import Run
from library.training.step.accumulation import Window
from library.types import Batch
from tests.unit.training.test_loop import batch_of, run_of

GOOD, DAMAGED = 1.3, float("nan")
SCHEDULES = {
    "constant": {},
    "linear": {"lr_scheduler": "linear"},
    "warm-up": {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4},
    "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
}


def batches_with(values: list[float]) -> list[Batch]:
    return [batch_of(value + 0.1 * place) for place, value in enumerate(values)]


def run_steps(values: list[float], is_late: bool, **options: Any) -> tuple[Run, list[StepResult], list[Tensor]]:
    """Run step i with the batch `values[i]`; return the run, the reported results and the weight after each step."""
    batches = batches_with(values)
    run = run_of(0.7, tuple(batches), optimizer_type="AdamW", **options)
    average = WeightAverage(run.context.network.trainable_parameters(), 0.5, 0)
    optimization = replace(run.optimization, average=average)
    run = replace(run, plan=replace(run.plan, num_batches=len(values), accumulation=1), optimization=optimization)
    results: list[StepResult] = []
    updates, weights = Updates(run, NonFiniteGuard(run), None, results.append), []
    assert updates.reports_late, "AdamW is fused where nothing else is asked for"
    updates.reports_late = is_late
    with updates.reported_at_end():
        for step, batch in enumerate(batches):
            window = Window(step, 1, range(step, step + 1), False)
            losses = accumulate_gradients(run, window, iter([batch]))
            updates.report()
            updates.apply(window, losses)
            weights.append(run.context.network.module.weight.detach().clone())  # type: ignore[operator, union-attr]
    return run, results, weights


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_late_reports_do_not_change_weights_or_results(schedule: str, caplog: pytest.LogCaptureFixture) -> None:
    values = [GOOD, GOOD, DAMAGED, GOOD, float("inf"), DAMAGED, GOOD, GOOD]
    (late, results, weights), (early, *at_once) = (
        run_steps(values, is_late, **SCHEDULES[schedule]) for is_late in (True, False)
    )
    assert str(results) == str(at_once[0])  # as text, NaN equals itself
    assert torch.equal(torch.stack(weights), torch.stack(at_once[1]))
    (memory,), (other,) = (list(run.optimization.optimizer.state.values()) for run in (late, early))
    assert memory.keys() == other.keys() and all(torch.equal(memory[name], other[name]) for name in memory)
    assert int(memory["step"]) == 5
    states = [run.optimization.schedule.state_dict() for run in (late, early)]
    assert states[0] == states[1]
    assert [result.window.step for result in results] == list(range(8))
    assert torch.equal(weights[1], weights[2]) and torch.equal(weights[3], weights[5])
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == 6 and lines[:3] == lines[3:]


@pytest.mark.parametrize("is_late", [True, False])
def test_the_moving_average_stays_on_skipped_steps(is_late: bool) -> None:
    values = [GOOD, GOOD, DAMAGED, DAMAGED, GOOD]
    run, _, weights = run_steps(values, is_late)
    average = run.optimization.average
    assert average is not None and average.num_updates == 3
    # The decay rises as (1 + n) / (10 + n) for the n-th update after the first.
    wanted = weights[0]
    for number, step in ((1, 1), (2, 4)):
        decay = (1 + number) / (10 + number)
        wanted = decay * wanted + (1 - decay) * weights[step]
    assert torch.allclose(average.values[0], wanted, rtol=1e-6, atol=0)


def test_a_step_is_reported_once_the_next_one_is_computed() -> None:
    run = run_of(optimizer_type="AdamW")
    results: list[StepResult] = []
    updates = Updates(run, NonFiniteGuard(run), None, results.append)
    window = Window(0, 1, range(1), False)
    updates.apply(window, accumulate_gradients(run, window, iter([batch_of(2.0)])))
    assert not results and run.optimization.schedule.state_dict()["last_epoch"] == 0
    updates.report()
    updates.report()
    assert [result.losses for result in results] == [[pytest.approx(16.0)]]
    assert results[0].norm == pytest.approx(16.0)
    assert run.optimization.schedule.state_dict()["last_epoch"] == 1


def test_an_error_is_raised_after_all_steps_are_reported() -> None:
    run = run_of(optimizer_type="AdamW")
    results: list[StepResult] = []
    updates = Updates(run, NonFiniteGuard(run), None, results.append)
    window = Window(0, 1, range(1), False)
    with pytest.raises(UserError, match="no such image"), updates.reported_at_end():
        updates.apply(window, accumulate_gradients(run, window, iter([batch_of(2.0)])))
        raise UserError("no such image")
    assert len(results) == 1


def test_a_run_that_stops_at_non_finite_values_stops_before_the_next_update(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(NonFiniteError, match="step 2: loss nan") as stopped:
        run_steps([GOOD, DAMAGED, GOOD], is_late=True, on_nonfinite="stop")
    assert stopped.value.last_good == (1, 1)


@pytest.mark.parametrize(
    ("options", "is_late"),
    [
        ({"optimizer_type": "AdamW"}, True),
        ({"optimizer_type": "AdamW", "optimizer_args": ["foreach=True"]}, False),
        ({"optimizer_type": "SGD"}, False),
        ({"optimizer_type": "SGD", "optimizer_args": ["fused=True"]}, True),
        ({"optimizer_type": "Lion"}, False),
    ],
)
def test_only_optimizers_that_skip_steps_themselves_report_late(options: dict[str, Any], is_late: bool) -> None:
    assert skips_by_itself(run_of(**options)) is is_late


def test_searching_for_non_finite_values_keeps_the_gradients_of_a_later_step() -> None:
    run = run_of(optimizer_type="AdamW")
    accumulate_gradients(run, Window(1, 1, range(1), False), iter([batch_of(2.0)]))
    (parameter,) = run.context.network.trainable_parameters()
    assert parameter.grad is not None
    before = parameter.grad.clone()
    find_first_damage(run, batch_of(DAMAGED), 0, 0)
    assert torch.equal(parameter.grad, before)
