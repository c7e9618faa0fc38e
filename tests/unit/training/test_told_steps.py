"""The norms that are told of a step."""

import pytest
import torch
from torch import nn

from library.training.reporting.step_events import EVERY, NormMeter


def groups() -> torch.optim.Optimizer:
    """Two groups of random weights; one of them has no gradient."""
    generator = torch.Generator().manual_seed(31)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (2, 2, 2))]
    for parameter in made[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return torch.optim.SGD([{"params": made[:1]}, {"params": made[1:]}], lr=0.1)


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).square().sum().sqrt())


def test_they_are_those_of_each_group() -> None:
    """Against a float64 sum; a third-party network may name more groups than there are."""
    optimizer, meter = groups(), NormMeter(is_on=True)
    meter.measure(optimizer, 2 * EVERY)
    found = meter.read(["unet", "textencoder", "nobody"])
    assert found is not None and list(found) == ["unet", "textencoder"]
    for norms, group in zip(found.values(), optimizer.param_groups, strict=True):
        assert norms.weight == pytest.approx(norm(group["params"]), rel=1e-6)
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        assert norms.gradient == pytest.approx(norm(gradients), rel=1e-6)


def test_they_are_measured_every_tenth_step_if_at_all_and_told_once() -> None:
    optimizer, meter = groups(), NormMeter(is_on=True)
    told = []
    for step in range(2 * EVERY + 1):
        meter.measure(optimizer, step)
        told.append(meter.read(["a", "b"]) is not None)
    assert [step for step, is_told in enumerate(told) if is_told] == [0, EVERY, 2 * EVERY]
    meter.measure(optimizer, 0)
    assert meter.read(["a", "b"]) is not None and meter.read(["a", "b"]) is None
    silent = NormMeter(is_on=False)
    silent.measure(optimizer, 0)
    assert silent.read(["a", "b"]) is None
