"""Muon for matrices, AdamW for the rest: each weight moves as the optimizer that it belongs to moves it alone."""

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


def test_every_weight_moves_as_alone_and_at_the_rate_of_its_group() -> None:
    ours, alone = parameters(701), parameters(701)
    groups = [{"params": ours[:3], "lr": 0.02}, {"params": ours[3:], "lr": 0.005}]
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
        for one, other in zip(ours, alone, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        if step == 3:  # as a schedule does
            for group in (*built.optimizer.param_groups, *(g for optimizer in theirs for g in optimizer.param_groups)):
                group["lr"] *= 0.1
        built.optimizer.step()
        for optimizer in theirs:
            optimizer.step()
    for one, other in zip(ours, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_one_line_says_how_many_weights_each_moves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        MuonWithAdamW([{"params": parameters(703)}])
    assert "Muon moves 2 of the 6 weights, which are matrices; AdamW moves the others" in caplog.text
    assert [is_matrix(p) for p in parameters(703)] == [True, False, False, False, False, True]


def test_matrices_alone_and_none_at_all() -> None:
    for shapes in ([(3, 4)], [(3,), (2, 2, 1, 1)]):
        weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = MuonWithAdamW([{"params": weights}], lr=0.1)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert all((weight < 1).all() for weight in weights)
