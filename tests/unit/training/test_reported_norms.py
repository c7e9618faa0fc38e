"""The norms that are reported for a step."""

import pytest
import torch
from torch import nn

from library.training.reporting.step_events import EVERY, NormMeter


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
