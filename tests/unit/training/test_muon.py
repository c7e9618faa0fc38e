"""Muon for matrices, AdamW for the rest: each weight is updated as by its optimizer alone."""

import logging

import pytest
import torch
from torch import nn

from library.options.training.optimizer import OptimizerOptions
from library.training.optimization.muon import MuonWithAdamW, is_matrix
from library.training.optimization.optimizers import build_optimizer

SHAPES = [(8, 5), (6, 4, 3, 3), (1, 7), (), (9,), (4, 12)]


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_every_weight_is_updated_as_by_its_optimizer_alone_at_the_rate_of_its_group() -> None:
    combined, alone = parameters(701), parameters(701)
    groups = [{"params": combined[:3], "lr": 0.02}, {"params": combined[3:], "lr": 0.005}]
    built = build_optimizer(OptimizerOptions("muon", optimizer_args=["weight_decay=0.03"]), groups)
    assert len(built.optimizer.param_groups) == 2
    theirs = []
    for number, parameter in enumerate(alone):
        lr = 0.02 if number < 3 else 0.005
        if number in (0, 5):
            theirs.append(torch.optim.Muon([parameter], lr, 0.03, adjust_lr_fn="match_rms_adamw"))
        else:
            theirs.append(torch.optim.AdamW([parameter], lr, weight_decay=0.03))
    generator = torch.Generator().manual_seed(702)
    for step in range(6):
        for actual, expected in zip(combined, alone, strict=True):
            actual.grad = torch.randn(actual.shape, generator=generator)
            expected.grad = actual.grad.clone()
        if step == 3:  # as a schedule does
            for group in (*built.optimizer.param_groups, *(g for optimizer in theirs for g in optimizer.param_groups)):
                group["lr"] *= 0.1
        built.optimizer.step()
        for optimizer in theirs:
            optimizer.step()
    for actual, expected in zip(combined, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_log_counts_the_weights_of_each_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        MuonWithAdamW([{"params": parameters(703)}])
    assert "Muon moves 2 of the 6 weights, which are matrices; AdamW moves the others" in caplog.text
    assert [is_matrix(p) for p in parameters(703)] == [True, False, False, False, False, True]


def test_only_matrices_or_no_matrices_are_trained() -> None:
    for shapes in ([(3, 4)], [(3,), (2, 2, 1, 1)]):
        weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = MuonWithAdamW([{"params": weights}], lr=0.1)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert all((weight < 1).all() for weight in weights)


def test_a_loaded_state_keeps_its_settings() -> None:
    """torch's optimizers keep theirs too. Other --optimizer_args on resume have no effect, as the log says."""
    trained = []
    for weight_decay in (0.5, 0.0):
        weights = parameters(704)
        before, after = (MuonWithAdamW([{"params": weights}], weight_decay=decay) for decay in (0.5, weight_decay))
        after.load_state_dict(before.state_dict())
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        after.step()
        trained.append(weights)
    for kept, other in zip(*trained, strict=True):
        assert torch.equal(kept, other)
