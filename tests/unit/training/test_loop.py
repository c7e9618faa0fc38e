"""A training step assembled by hand: order of operations, prefetching, reported norms and updates."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.training.failures.nonfinite import NonFiniteError, NonFiniteGuard
from library.training.failures.nonfinite_trace import find_first_damage
from library.training.loop.ahead import Ahead, move_batch
from library.training.loop.loop import accumulate_gradients
from library.training.loop.update import Updates, skips_by_itself
from library.training.optimization.ema import WeightAverage
from library.training.optimization.lr_schedules import build_schedule
from library.training.optimization.optimizers import build_optimizer
from library.training.reporting.step_events import EVERY, NormMeter, StepResult
from library.training.reporting.step_times import StepTimes
from library.training.run_parts import Optimization, Run
from library.training.step.accumulation import StepPlan, Window
from library.training.step.context import Models, StepContext
from library.types import Batch, Noised
from networks.core.protocol import AdoptedNetwork

RATE = 0.1


class Line(nn.Module):
    """A network with one trained number: the denoiser returns weight * latents."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))


class Halves:
    """An objective whose target is half of the latents, without noise, so every number can be computed by hand."""

    num_strata = 1

    def corrupt(self, clean_BCHW: Tensor, generator: torch.Generator, offsets_B: None, uniforms_B: None) -> Noised:
        zeros_B = torch.zeros(len(clean_BCHW))
        return Noised(clean_BCHW, clean_BCHW, clean_BCHW, zeros_B, zeros_B)

    def noise_levels(self, noised: Noised) -> Tensor:
        return noised.sigmas_B

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        return output_BCHW

    def target(self, noised: Noised) -> Tensor:
        return noised.clean_BCHW / 2

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        return (prediction_BCHW - target_BCHW).square()


def batch_of(value: float, weight: float = 1.0) -> Batch:
    return Batch(
        keys=["a.png"],
        captions=[""],
        pixels_BCHW=None,
        latents_BCHW=torch.full((1, 1, 2, 2), value),
        conditioning={},
        loss_weights_B=torch.tensor([weight]),
        masks_B1HW=None,
        sizes_B6=torch.tensor([[16.0] * 6]),
        attributes=[{}],
    )


def run_of(max_grad_norm: float = 0.0, batches: tuple[Batch, ...] = (), **options_of_user: Any) -> Run:
    network = Line()
    with torch.no_grad():
        network.weight.fill_(2.5)  # two above the optimum
    arch: Any = SimpleNamespace(
        objective=Halves(),
        codec=SimpleNamespace(normalize=lambda latents: latents),
        inpaints=False,
        predict=lambda denoiser, noised, conditioning, batch: network.weight * noised.latents_BCHW,
        vary=None,
        text_cache=None,
    )
    context = StepContext(
        arch=arch,
        models=Models(nn.Identity(), [], None, ([], nn.Identity())),
        network=AdoptedNetwork(network),
        seed=3,
        device=torch.device("cpu"),
        autocast=nullcontext,
        trains_text_encoder=False,
        captions=None,  # type: ignore[arg-type]
    )
    values = {"max_grad_norm": max_grad_norm, "optimizer_type": "SGD", "max_train_steps": 10, **options_of_user}
    options = TrainOptions().with_values(values)
    built = build_optimizer(options.optimizer, [{"params": [network.weight], "lr": RATE}])
    schedule = build_schedule(options.schedule, built, options.run.max_train_steps)
    optimization = Optimization(built, schedule, None, ["unet"])
    data: Any = None
    drawn: Any = SimpleNamespace(iterate_epoch=lambda epoch, indices, *_: iter([batches[i] for i in indices]))
    plan = StepPlan(num_batches=4, accumulation=2, max_train_steps=10)
    return Run(options, ALONE, data, drawn, plan, context, optimization)


def weight_of(run: Run) -> float:
    return float(run.context.network.module.weight.detach())  # type: ignore[arg-type]


def step(run: Run, window: Window, *batches: Batch) -> list[float]:
    results: list[StepResult] = []
    updates = Updates(run, NonFiniteGuard(run), None, results.append)
    updates.apply(window, accumulate_gradients(run, window, iter(batches)))
    updates.report()
    return results[0].losses


@pytest.mark.parametrize("values", [(1.0, 3.0), (2.0,)])
def test_a_step_follows_the_mean_gradient_of_its_window(values: tuple[float, ...]) -> None:
    """The loss of x is (w x - x / 2)^2, so its gradient is 2 x^2 (w - 1/2)."""
    run = run_of()
    losses = step(run, Window(0, 1, range(len(values)), False), *map(batch_of, values))
    assert losses == pytest.approx([(2 * x) ** 2 for x in values])
    gradient = sum(2 * x**2 * 2 for x in values) / len(values)
    assert weight_of(run) == pytest.approx(2.5 - RATE * gradient)
    assert run.context.network.module.weight.grad is None


def test_subset_weights_scale_the_loss() -> None:
    run = run_of()
    assert step(run, Window(0, 1, range(1), False), batch_of(1.0, weight=0.25)) == pytest.approx([1.0])
    assert weight_of(run) == pytest.approx(2.5 - RATE * 0.25 * 4)


def test_large_gradients_are_clipped_to_the_limit() -> None:
    run = run_of(max_grad_norm=0.5)
    step(run, Window(0, 1, range(1), False), batch_of(3.0))
    assert weight_of(run) == pytest.approx(2.5 - RATE * 0.5, rel=1e-4)  # torch divides by the norm plus 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_neither_weight_nor_schedule(value: float, caplog: pytest.LogCaptureFixture) -> None:
    damaged = batch_of(value)
    run = run_of(batches=(batch_of(1.0), damaged))
    window = Window(0, 1, range(2), False)
    before = run.optimization.schedule.state_dict()["last_epoch"]
    step(run, window, batch_of(1.0), damaged)
    assert weight_of(run) == 2.5 and run.optimization.schedule.state_dict()["last_epoch"] == before
    assert "a.png" in caplog.text and "The step is skipped" in caplog.text
    step(run, replace(window, step=1), batch_of(1.0), batch_of(1.0))
    assert weight_of(run) < 2.5, "the next step is as if there had been no damage"


def test_non_finite_weights_end_the_run() -> None:
    run = run_of(batches=(batch_of(1.0),))
    with torch.no_grad():
        run.context.network.module.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(NonFiniteError, match="adapter's weights are damaged"):
        step(run, Window(0, 1, range(1), False), batch_of(1.0))


# Prefetching one batch: the order of fetching, copying and use, and how errors are passed on.


class SlowCopies:
    """A device whose copies are NaN until they are waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.coming: dict[int, Batch] = {}

    def start(self, batch: Batch) -> Batch:
        copied = move_batch(batch, (), lambda tensor: torch.full_like(tensor, float("nan")))
        self.log.append(f"start {number_of(batch)}")
        self.coming[id(copied)] = batch
        return copied

    def ready(self, batch: Batch) -> None:
        batch_on_device = self.coming.pop(id(batch))
        assert batch.latents_BCHW is not None and batch_on_device.latents_BCHW is not None
        batch.latents_BCHW.copy_(batch_on_device.latents_BCHW)
        self.log.append(f"ready {number_of(batch_on_device)}")


def number_of(batch: Batch) -> int:
    return int(batch.keys[0])


def batches(count: int, log: list[str], broken: int = -1) -> Iterator[Batch]:
    for number in range(count):
        if number == broken:
            raise UserError(f"picture {number} is damaged")
        log.append(f"fetch {number}")
        yield replace(batch_of(1.0 + number), keys=[str(number)])


def test_a_batch_is_fetched_and_copied_while_the_previous_one_computes() -> None:
    log: list[str] = []
    run = run_of()
    ahead = Ahead(batches(4, log), 3, SlowCopies(log), run.times)

    def fetch() -> None:
        log.append("computes")
        ahead.fetch()

    losses = [accumulate_gradients(run, Window(i, 1, range(i, i + 1), False), ahead, fetch) for i in range(3)]
    assert log == [
        "fetch 0", "start 0", "ready 0", "computes",
        "fetch 1", "start 1", "ready 1", "computes",
        "fetch 2", "start 2", "ready 2", "computes",
    ]  # fmt: skip
    assert [float(loss) for loss in losses] == pytest.approx([(2 * x) ** 2 for x in (1.0, 2.0, 3.0)])
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_fetching_error_is_raised_when_the_batch_is_requested() -> None:
    ahead = Ahead(batches(3, [], broken=1), 3, None, StepTimes())
    assert number_of(next(ahead)) == 0
    ahead.fetch()
    for _ in range(2):
        with pytest.raises(UserError, match="picture 1 is damaged"):
            next(ahead)


def test_tensors_that_the_cpu_needs_stay_on_the_cpu() -> None:
    batch = replace(batch_of(2.0), conditioning={"mask": torch.ones(1, 3), "states": torch.ones(1, 3, 5)})
    copied = move_batch(batch, ("mask",), lambda tensor: tensor + 1)
    assert copied.conditioning is not None and batch.conditioning is not None
    assert copied.conditioning["mask"] is batch.conditioning["mask"]
    assert bool((copied.conditioning["states"] == 2).all()) and bool((copied.latents_BCHW == 3).all())  # type: ignore[union-attr]
    assert copied.sizes_B6 is batch.sizes_B6 and copied.pixels_BCHW is None


# The norms that are reported for a step.


def groups() -> torch.optim.Optimizer:
    """Return an optimizer with two groups of random weights, one of them without a gradient."""
    generator = torch.Generator().manual_seed(31)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (2, 2, 2))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).square().sum().sqrt())


def test_norms_are_reported_per_group() -> None:
    """Compare with a float64 sum; a third-party network may name more groups than exist."""
    optimizer, meter = groups(), NormMeter(is_on=True)
    meter.measure(optimizer, 2 * EVERY)
    norms_by_group = meter.read(["unet", "textencoder", "nobody"])
    assert norms_by_group is not None and list(norms_by_group) == ["unet", "textencoder"]
    for norms, group in zip(norms_by_group.values(), optimizer.param_groups, strict=True):
        assert norms.weight == pytest.approx(norm(group["params"]), rel=1e-6)
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        assert norms.gradient == pytest.approx(norm(gradients), rel=1e-6)


def test_norms_are_measured_every_tenth_step_if_enabled_and_reported_once() -> None:
    optimizer, meter = groups(), NormMeter(is_on=True)
    reported = []
    for step in range(2 * EVERY + 1):
        meter.measure(optimizer, step)
        reported.append(meter.read(["a", "b"]) is not None)
    assert [step for step, is_reported in enumerate(reported) if is_reported] == [0, EVERY, 2 * EVERY]
    meter.measure(optimizer, 0)
    assert meter.read(["a", "b"]) is not None and meter.read(["a", "b"]) is None
    silent = NormMeter(is_on=False)
    silent.measure(optimizer, 0)
    assert silent.read(["a", "b"]) is None


# Steps whose results are reported late, while the next step is computed, have the same effect and reports.

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
