"""Noise levels, the noise of each image, and the standard error of a paired difference."""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch

from library.base.randomness import generator_for
from library.diffusion.flow import FlowMatching
from library.diffusion.objective import build_ddpm
from library.diffusion.timesteps import LevelSampler
from library.options.training.noise import NoiseOptions
from library.training.evaluation.validation import ValidationSchedule
from library.training.evaluation.validation_loss import (
    Difference,
    corrupt_each,
    estimate_paired_difference,
    noise_levels,
)
from tests.unit.data.builders import options_of


@pytest.mark.parametrize(
    ("low", "high", "levels"),
    [
        (None, None, (200, 400, 600, 800)),
        (0, 1000, (200, 400, 600, 800)),
        (100, 333, (146, 193, 239, 286)),
        (500, 502, (500, 501)),
        (999, 1000, (999,)),
    ],
)
def test_levels_divide_the_range_as_numpy_does(low, high, levels):
    options = replace(NoiseOptions(), min_timestep=low, max_timestep=high)
    expected = np.linspace(low or 0, 1000 if high is None else high, 6)[1:-1].astype(int)
    assert noise_levels(options) == levels == tuple(dict.fromkeys(expected.tolist()))


def test_the_error_of_a_difference_matches_a_paired_t_test():
    rng = np.random.default_rng(1)
    before, now = rng.normal(size=(2, 9, 4))
    difference = estimate_paired_difference(torch.tensor(now), torch.tensor(before), [f"picture {i}" for i in range(9)])
    differences = (now - before).mean(1)
    assert difference.mean == pytest.approx(differences.mean(), rel=1e-12)
    assert difference.standard_error == pytest.approx(
        differences.std(ddof=1) / np.sqrt(9), rel=1e-12
    )  # both are float64


def test_several_rows_of_one_image_are_one_observation():
    """Two equal rows per image carry no more information than one: only (G / (G - 1)) is unchanged."""
    rng = np.random.default_rng(2)
    before, now = (torch.tensor(values) for values in rng.normal(size=(2, 6, 4)))
    once = estimate_paired_difference(now, before, range(6))
    twice = estimate_paired_difference(now.repeat(2, 1), before.repeat(2, 1), [*range(6), *range(6)])
    assert twice.mean == pytest.approx(once.mean, rel=1e-12)
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert (
        estimate_paired_difference(now.repeat(2, 1), before.repeat(2, 1), range(12)).standard_error
        < once.standard_error
    )


def test_one_image_has_no_error_and_equal_weights_no_difference():
    losses = torch.rand(1, 4, dtype=torch.float64)
    alone = estimate_paired_difference(losses, losses + 1, ["a"])
    assert alone.mean == pytest.approx(-1) and isnan(alone.standard_error) and not alone.is_clear
    same = estimate_paired_difference(losses.repeat(3, 1), losses.repeat(3, 1), "abc")
    assert (same.mean, same.standard_error) == (0.0, 0.0) and not same.is_clear
    assert Difference(-0.3, 0.1).is_clear and not Difference(0.1, 0.1).is_clear


def uniform() -> LevelSampler:
    return lambda draws: torch.rand(draws.num_samples, generator=draws.generator)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_noise_and_level_of_an_image_do_not_depend_on_its_neighbours(kind):
    options = options_of("--multires_noise_iterations 2 --ip_noise_gamma 0.1" if kind == "ddpm" else "")
    objective = (
        build_ddpm(options.noise, options.loss, predicts_velocity=False)
        if kind == "ddpm"
        else FlowMatching(options.noise, options.loss, uniform(), "noise - latent", "raw", "none")
    ).at_timestep(600)
    clean_BCHW = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def noised(places):
        return corrupt_each(objective, clean_BCHW[list(places)], [generator_for(1, "test", place) for place in places])

    together, apart = noised([0, 1, 2]), noised([2])
    assert together.timesteps_B.tolist() == [600] * 3
    assert torch.equal(together.latents_BCHW[2:], apart.latents_BCHW)
    assert torch.equal(together.noise_BCHW[2:], apart.noise_BCHW)
    assert not torch.equal(together.noise_BCHW[0], together.noise_BCHW[1])


def test_validation_is_due_by_steps_and_at_the_end_of_epochs():
    options = options_of("--validate_every_n_steps 3 --validate_every_n_epochs 2").validation
    timetable = ValidationSchedule.build(options, 10)
    assert list(timetable.due(3, None)) == ["step"] and list(timetable.due(4, 1)) == []
    assert list(timetable.due(6, 2)) == ["step", "epoch"]
    always = ValidationSchedule.build(options_of("").validation, 8)
    assert list(always.due(3, None)) == [] and list(always.due(4, 1)) == list(always.due(8, 2)) == ["epoch"]


def test_with_an_interval_in_steps_epochs_are_ignored_and_the_last_step_is_measured():
    timetable = ValidationSchedule.build(options_of("--validate_every_n_steps 3").validation, 8)
    assert [step for step in range(1, 9) if list(timetable.due(step, step // 2 if step % 2 == 0 else None))] == [
        3,
        6,
        8,
    ]
    assert list(timetable.due(6, 3)) == list(timetable.due(8, 4)) == ["step"]
