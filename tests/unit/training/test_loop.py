"""A training step assembled by hand: the update from a window of batches, and the order of operations."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.training.failures.nonfinite import NonFiniteError, NonFiniteGuard
from library.training.loop.loop import accumulate_gradients
from library.training.loop.update import Updates
from library.training.optimization.lr_schedules import build_schedule
from library.training.optimization.optimizers import build_optimizer
from library.training.reporting.step_events import StepResult
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
