"""The noise levels of MOSS-Image against the distribution that its authors describe."""

from statistics import NormalDist

import pytest
import torch

from library.architectures.moss_image.assembly import build_objective
from library.architectures.moss_image.levels import draw_levels, preview_sampler
from library.architectures.moss_image.options import MossImageOptions
from library.diffusion.timesteps import LevelDraws
from moss_image_train_network import setup_parser
from tests.parity.test_preview import prompt_of


def share_below(sigma: float) -> float:
    """Return how often a level is below `sigma`: x = sigmoid(1.09 + 0.95 z) given x <= 0.95, divided by 0.95, or for
    1 % a uniform value."""
    logits = [torch.tensor(x, dtype=torch.float64).logit().item() for x in (0.95 * sigma, 0.95)]
    below, kept = (NormalDist(1.09, 0.95).cdf(logit) for logit in logits)
    return 0.99 * below / kept + 0.01 * sigma


@pytest.mark.parametrize("is_stratified", [False, True])
def test_levels_have_the_published_distribution(is_stratified: bool) -> None:
    count = 200_000
    uniforms = (torch.arange(count) + 0.5) / count if is_stratified else None
    levels = draw_levels(LevelDraws(count, 8, 8, torch.Generator().manual_seed(4), None, uniforms))
    assert torch.equal(levels, (1000 * levels).round() / 1000) and levels.min() > 0 and levels.max() == 1
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        # A level is rounded to the nearest thousandth.
        actual = (levels < sigma + 0.0004).double().mean().item()
        assert actual == pytest.approx(share_below(sigma + 0.0005), abs=2e-4 if is_stratified else 4e-3)


def test_the_options_of_sd_scripts_draw_its_form_of_the_levels() -> None:
    """Without the cut at 0.95 and the uniform share; its table descends, so its mean is negative."""
    words = "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean -1.09 --logit_std 0.95"
    options = MossImageOptions.from_args(setup_parser().parse_args(words.split()))
    assert options.flow_sampling.discrete_flow_shift == 1.0
    objective = build_objective(options)
    assert objective.takes_offset
    levels = objective.draw_levels(LevelDraws(100_000, 8, 8, torch.Generator().manual_seed(4)))
    for sigma in (0.3, 0.7, 0.9):
        expected = NormalDist(1.09, 0.95).cdf(torch.tensor(sigma, dtype=torch.float64).logit().item())
        assert (levels < sigma).double().mean().item() == pytest.approx(expected, abs=5e-3)


def test_levels_of_many_preview_steps_do_not_repeat() -> None:
    levels = [level.sigma for level in preview_sampler(prompt_of(flow_shift=5.0, num_steps=600)).levels]
    assert levels == sorted(set(levels), reverse=True) and levels[0] == 1.0
