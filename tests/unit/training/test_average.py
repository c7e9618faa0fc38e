"""The moving average of the weights: its values, and that using it temporarily has no side effects."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.options.training.averaging import FILES, PREVIEWS, VALIDATION, AveragingOptions
from library.training.evaluation.without_side_effects import show_weights
from library.training.optimization.ema import WeightAverage
from library.training.run.optimization import build_average
from networks.core.protocol import adopt
from tests.hiding import lazily

training_utils = lazily("diffusers.training_utils")


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)).to(dtype)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize(("decay", "begin"), [(0.9, 0), (0.999, 0), (0.5, 4), (0.95, 20)])
def test_the_average_matches_diffusers_at_every_step(decay: float, begin: int) -> None:
    model = model_of(601)
    average = WeightAverage(list(model.parameters()), decay, begin)
    theirs = training_utils.EMAModel(model.parameters(), decay=decay, update_after_step=begin)
    for _ in range(30):
        move(model)
        average.update()
        theirs.step(model.parameters())
        for actual, expected in zip(average.values, theirs.shadow_params, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    moved = [float((v - p).abs().max()) for v, p in zip(average.values, model.parameters(), strict=True)]
    assert min(moved) > 1e-3


def test_the_average_is_used_temporarily_and_the_weights_are_restored_bit_for_bit() -> None:
    model = model_of(602, torch.bfloat16)
    average = WeightAverage(list(model.parameters()), 0.9, 0)
    before = copy.deepcopy(model.state_dict())
    with average.shown():  # no step has been averaged yet
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    for _ in range(5):
        move(model)
        average.update()
    trained = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), average.shown():
        for parameter, value in zip(model.parameters(), average.values, strict=True):
            assert torch.equal(parameter, value.bfloat16())
        raise KeyError
    assert all(torch.equal(t, trained[key]) for key, t in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in average.values)


def test_the_average_resumes_from_its_state_bit_for_bit() -> None:
    model = model_of(603)
    uninterrupted = WeightAverage(list(model.parameters()), 0.8, 2)
    states = []
    for step in range(8):
        move(model)
        uninterrupted.update()
        if step == 3:
            states.append(copy.deepcopy((uninterrupted.state_dict(), model.state_dict(), torch.get_rng_state())))
    last = [value.clone() for value in uninterrupted.values]
    (state, weights, rng), *_ = states
    model.load_state_dict(weights)
    resumed = WeightAverage(list(model.parameters()), 0.8, 2)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    for _ in range(4):
        move(model)
        resumed.update()
    assert all(torch.equal(actual, expected) for actual, expected in zip(resumed.values, last, strict=True))
    with pytest.raises(ValueError, match="it is the average of other weights"):
        WeightAverage(list(nn.Linear(2, 2).parameters()), 0.8, 2).load_state_dict(state)


@pytest.mark.parametrize("used", [None, [FILES], [PREVIEWS, VALIDATION], [VALIDATION]])
def test_the_average_is_used_only_for_the_requested_purposes(used: list[str] | None) -> None:
    model = model_of(604)
    average = WeightAverage(list(model.parameters()), 0.9, 0)
    for _ in range(3):
        move(model)
        average.update()
    built = SimpleNamespace(eval=lambda: None, train=lambda: None)
    run: Any = SimpleNamespace(
        optimization=SimpleNamespace(built=built, average=average),
        options=SimpleNamespace(averaging=AveragingOptions(ema_decay=0.9, ema_used_for=used)),
    )
    for use in (FILES, PREVIEWS, VALIDATION):
        with show_weights(run, use):
            shows = torch.equal(next(model.parameters()), average.values[0])
        assert shows == (used is None or use in used)


class Trained(nn.Linear):
    def apply_to(self) -> None: ...
    def prepare_optimizer_params(self) -> None: ...
    def save_weights(self) -> None: ...


def test_ema_is_refused_with_an_optimizer_that_averages_by_itself() -> None:
    options, kind = AveragingOptions(ema_decay=0.99), "AdamWScheduleFree"
    network = adopt(Trained(2, 2))
    assert build_average(options, kind, network, is_schedule_free=False) is not None
    with pytest.raises(ValueError, match=r"--ema_decay 0.99 does not work with --optimizer_type AdamWScheduleFree"):
        build_average(options, kind, network, is_schedule_free=True)
