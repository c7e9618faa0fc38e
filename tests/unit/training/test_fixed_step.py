"""The form of a step that a CUDA graph can record, repeated on the CPU: its numbers are those of the plain step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.training.failures.nonfinite import NonFiniteGuard
from library.training.loop.loop import accumulate_gradients
from library.training.loop.update import Updates
from library.training.reporting.step_result import Told
from library.training.run_parts import Run
from library.training.step.accumulation import Window
from library.training.step.fixed_step import FixedSteps, Repeat, Work
from library.types import Batch
from tests.unit.training.test_loop import batch_of, run_of

NUM_STEPS = 50
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {"lr_warmup_steps": 7},
    "linear": {"lr_warmup_steps": 0.1},
    "cosine": {"lr_warmup_steps": 3},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 3},
    "polynomial": {"lr_scheduler_power": 1.7},
    "inverse_sqrt": {"lr_warmup_steps": 4},
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.2},
    "warmup_stable_decay": {"lr_warmup_steps": 5, "lr_decay_steps": 20},
    "piecewise_constant": {"lr_scheduler_args": ["step_rules='1:10,0.1:30,0.01'"]},
}


class Places(Repeat):
    """Notes, whenever recorded work is repeated, where the tensors are that it computes with."""

    def __init__(self, tensors: Callable[[], Iterator[Tensor]]) -> None:
        self.tensors, self.seen, self.num_records = tensors, set[tuple[int, ...]](), 0

    def record(self, work: Work) -> Work:
        self.num_records += 1

        def repeat() -> None:
            self.seen.add(tuple(tensor.data_ptr() for tensor in self.tensors()))
            work()

        return repeat


def batches(seed: int) -> list[list[Batch]]:
    """The batches of 50 steps: two each, at times one, of two shapes, one step of them damaged."""
    rng = torch.Generator().manual_seed(seed)
    steps = []
    for step in range(NUM_STEPS):
        values = torch.rand(1 if step % 5 == 4 else 2, generator=rng).tolist()
        made = [batch_of(0.5 + value, weight=0.3 + value) for value in values]
        if step % 3 == 1:
            made[0] = replace(made[0], latents_BCHW=torch.full((1, 1, 2, 4), 0.5 + values[0]))
        if step == 20:
            made[-1] = batch_of(float("nan"))
        steps.append(made)
    return steps


def train(run: Run, steps: list[list[Batch]]) -> tuple[list[Told], list[Tensor]]:
    """What is told of each step, and the weight after it."""
    told: list[Told] = []
    updates, weights = Updates(run, NonFiniteGuard(run), None, told.append), []
    with updates.told_at_end():
        for step, made in enumerate(steps):
            window = Window(step, 1, range(2 * step, 2 * step + len(made)), False)
            losses = accumulate_gradients([run], window, iter(made))[0]
            updates.tell()
            updates.take(window, losses)
            weights.append(weight_of(run).detach().clone())
    return told, weights


def weight_of(run: Run) -> Tensor:
    (weight,) = run.context.network.trainable_parameters()
    return weight


def prepared(steps: list[list[Batch]], **options: Any) -> Run:
    flat = tuple(batch for made in steps for batch in (*made, *made)[:2])
    run = run_of(0.4, flat, optimizer_type="AdamW", max_train_steps=NUM_STEPS, **options)
    return replace(run, plan=replace(run.plan, num_batches=2 * NUM_STEPS))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fifty_steps_are_those_of_the_plain_form_bit_for_bit(schedule: str) -> None:
    steps = batches(seed=len(schedule))
    options = {"lr_scheduler": schedule, **SCHEDULES[schedule]}
    plain, fixed = prepared(steps, **options), prepared(steps, **options)

    def tensors() -> Iterator[Tensor]:
        weight = weight_of(fixed)
        assert weight.grad is not None
        yield from (weight, weight.grad)
        yield from fixed.optimization.optimizer.state[weight].values()

    recorder = Places(tensors)
    recorded = FixedSteps(fixed.context, fixed.optimization.optimizer, 0.4, recorder)
    (told, weights), (of_plain, weights_of_plain) = train(replace(fixed, fixed=recorded), steps), train(plain, steps)
    assert str(told) == str(of_plain)  # which makes a NaN equal to itself
    assert torch.equal(torch.stack(weights), torch.stack(weights_of_plain))
    assert recorder.num_records == 3 and recorded.num_recorded == 2, "two shapes of batches, and the update"
    assert len(recorder.seen) <= 2, "only the optimizer's memory may come, once, after the first record"
    rates = [group["lr"] for group in fixed.optimization.optimizer.param_groups]
    assert all(isinstance(rate, float) for rate in rates), "states and schedules know numbers"
