"""The suggested checkpoint: null experiments, files with true differences, and confidence intervals."""

from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from library.training.evaluation.choice import RankedFiles, average_by_image, choose, estimate, is_clearly_worse
from library.training.evaluation.choosing import MeasuredFile, choose_measured, format_choice, memorised
from tests.hiding import lazily

stats = lazily("scipy.stats")

pytestmark = pytest.mark.slow

NUM_RUNS = 1500


def choose_file(losses_FG: np.ndarray, num_baselines: int = 0) -> RankedFiles:
    result = choose(torch.tensor(losses_FG), num_baselines)
    assert result is not None
    return result


def runs_without_differences(num_files: int, num_images: int, kind: str, seed: int) -> np.ndarray:
    """Losses, shape (runs, F, G), of files that differ by noise alone; means and variances vary between images."""
    rng = np.random.default_rng(seed)
    shape = NUM_RUNS, num_files, num_images
    noise = rng.normal(size=shape)
    if kind == "walk":  # each file is the previous one with a small change, as in a run
        noise = noise.cumsum(1)
    elif kind == "skewed":
        noise = np.exp(noise)
    sharded = rng.uniform(0.5, 2.0, size=(NUM_RUNS, 1, num_images)) if kind != "equal" else 1.0
    return 0.2 + 0.1 * rng.normal(size=(NUM_RUNS, 1, num_images)) + 1e-3 * sharded * noise


@pytest.mark.parametrize(
    ("num_files", "num_images", "kind"),
    [(2, 8, "equal"), (8, 4, "walk"), (8, 20, "equal"), (20, 12, "walk"), (5, 10, "skewed"), (2, 3, "skewed")],
)
def test_files_that_differ_by_noise_alone_have_no_winner(num_files: int, num_images: int, kind: str) -> None:
    """A winner in at most 5 % of runs, and the earliest file is called worse in at most 2.5 %, within three sigma."""
    runs = runs_without_differences(num_files, num_images, kind, seed=num_files * 100 + num_images)
    choices = [choose_file(losses_FG) for losses_FG in runs]
    for rate, limit in (
        (np.mean([choice.has_winner for choice in choices]), 0.05),
        (np.mean([choice.files[0].is_worse for choice in choices]), 0.025),
    ):
        assert rate <= limit + 3 * (limit * (1 - limit) / NUM_RUNS) ** 0.5
    # the lowest loss alone would nearly always have picked another file
    assert np.mean([choice.best != 0 for choice in choices]) > 0.4


def test_two_files_without_a_difference_have_a_winner_at_the_stated_rate() -> None:
    """Too conservative would be wrong as well: with two files and normal noise the rate is exactly 5 %."""
    runs = runs_without_differences(2, 8, "equal", seed=5)
    rate = np.mean([choose_file(losses_FG).has_winner for losses_FG in runs])
    assert rate == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / NUM_RUNS) ** 0.5)


def test_skewed_differences_have_a_winner_up_to_three_times_as_often() -> None:
    """The limit of the guarantee of `choice`: log-normal differences around zero, two files, 12 images."""
    rng = np.random.default_rng(10)
    differences_RG = np.exp(rng.normal(size=(NUM_RUNS, 12))) - np.exp(0.5)
    rate = np.mean([choose_file(np.stack([row_G, 0 * row_G])).has_winner for row_G in differences_RG])
    assert 0.12 < rate < 0.17


@pytest.mark.parametrize(
    ("power", "most_lost", "least_lost_before"), [(1, 0.18, 0.58), (2, 0.12, 0.45)], ids=["even", "parabola"]
)
def test_the_suggestion_keeps_most_of_the_gain_of_training(
    power: int, most_lost: float, least_lost_before: float
) -> None:
    """Ten files on 12 images, the eighth truly best: it gains two standard deviations of the noise of one image.

    The earliest file that is not significantly worse, which was suggested before, loses 62 % of the gain on an even
    fall, the earliest within one standard error 15 %, and the lowest loss 7 %; on a parabola 48, 10 and 3 %. But the
    lowest picks a file that has trained too long several times as often.
    """
    rng = np.random.default_rng([11, power])
    best, gain = 7, 2.0
    true_F = gain * np.abs((np.arange(10) - best) / best) ** power
    lost: dict[str, list[float]] = {"suggested": [], "not worse": [], "lowest": []}
    num_late = dict.fromkeys(lost, 0)
    for _ in range(NUM_RUNS):
        result = choose_file(true_F[:, None] + rng.normal(size=(10, 12)) + 10 * rng.normal(size=12))
        not_worse = next(i for i, file in enumerate(result.files) if not file.is_worse)
        for rule, i in (("suggested", result.suggested), ("not worse", not_worse), ("lowest", result.best)):
            lost[rule].append(true_F[i] / gain)
            num_late[rule] += i > best
    means = {rule: float(np.mean(values)) for rule, values in lost.items()}
    assert means["suggested"] < most_lost and means["not worse"] > least_lost_before
    assert num_late["lowest"] > 3 * num_late["suggested"]


def test_a_true_best_file_and_a_plateau_are_found() -> None:
    """Differences of two standard deviations of the noise on 12 images, first with one best file, then with three."""
    for means, best, has_winner in (([4, 2, 0, 2, 4], (2,), True), ([4, 2, 0, 0, 0, 2], (2, 3, 4), False)):
        choices = []
        for seed in range(300):
            rng = np.random.default_rng([seed, len(means)])
            noise = rng.normal(size=(len(means), 12)) / 2**0.5  # of a difference: 1
            choices.append(choose_file(np.array(means)[:, None] + noise + 10 * rng.normal(size=12)))
        right = [choice.suggested in best and choice.has_winner == has_winner for choice in choices]
        assert np.mean(right) > 0.9


def test_copies_of_one_file_count_once() -> None:
    rng = np.random.default_rng(3)
    losses_a, losses_b = rng.normal(size=(2, 9))
    choice = choose_file(np.stack([losses_a] * 4))
    assert (choice.suggested, choice.has_winner) == (0, False) and not any(file.is_worse for file in choice.files)
    assert all((file.to_best.low, file.to_best.high) == (0.0, 0.0) for file in choice.files)
    worse = losses_a + 1 + 0.1 * losses_b
    choice = choose_file(np.stack([worse, losses_a, losses_a, worse]))  # copies do not add uncertainty
    assert (choice.suggested, choice.has_winner) == (1, True) and choice.files[2].is_copy
    alone = choose_file(np.stack([worse, losses_a]))
    assert choice.files[0] == alone.files[0]


def test_intervals_match_simultaneous_t_tests() -> None:
    losses_FG = np.random.default_rng(4).normal(size=(5, 7)) + np.arange(5)[:, None]
    choice = choose_file(losses_FG)
    for row, file in zip(losses_FG, choice.files, strict=True):
        single = stats.ttest_1samp(row, 0).confidence_interval(0.95)
        assert (file.loss.low, file.loss.high) == pytest.approx((single.low, single.high), rel=1e-9)
        if not file.is_copy:
            paired = stats.ttest_rel(row, losses_FG[choice.best]).confidence_interval(1 - 0.05 / 4)
            assert (file.to_best.low, file.to_best.high) == pytest.approx((paired.low, paired.high), rel=1e-9)


def test_a_baseline_is_compared_and_never_suggested() -> None:
    base = np.random.default_rng(6).normal(size=10)
    choice = choose_file(np.stack([base, base + 0.5, base + 0.25]), num_baselines=1)
    assert (choice.best, choice.suggested) == (2, 2) and not choice.files[0].is_worse and choice.files[1].is_worse


def test_a_single_image_decides_nothing_and_nan_losses_lose() -> None:
    choice = choose_file(np.array([[0.3], [0.1]]))
    assert (choice.best, choice.suggested, choice.has_winner) == (1, 1, False)
    choice = choose_file(np.array([[nan, 0.1], [0.3, 0.2], [0.31, 0.21]]))
    assert choice.suggested == 1 and choice.files[0].is_worse
    assert choose(torch.full((2, 3), nan)) is None


@pytest.mark.parametrize(("num_images", "is_suggested"), [(1, False), (7, False), (8, True)])
def test_too_few_images_give_no_suggestion(num_images: int, is_suggested: bool) -> None:
    base = np.random.default_rng(8).normal(size=num_images)
    measured = [MeasuredFile(Path(f"{i}.safetensors"), i, torch.tensor(base - i)) for i in (1, 2, 3)]
    choice = choose_measured(measured)
    assert choice is not None and (choice.suggested == "3.safetensors") == is_suggested
    if not is_suggested:
        assert choice.suggested is None and choice.step is None
        assert format_choice(choice).startswith("no file is suggested: too few images to tell")


def test_the_reason_names_the_standard_error() -> None:
    rng = np.random.default_rng(12)
    base, noise = rng.normal(size=(2, 9))
    rows = {1: base + 1, 2: base + 0.1 + noise, 3: base}
    choice = choose_measured([MeasuredFile(Path(f"{i}.pt"), i, torch.tensor(row)) for i, row in rows.items()])
    assert choice is not None and choice.suggested == "2.pt"
    gap, error = (rows[2] - rows[3]).mean(), (rows[2] - rows[3]).std(ddof=1) / 3
    assert f"that of 3.pt, which is {gap:.3g} lower (standard error {error:.3g})" in choice.reason


def test_several_rows_of_one_image_count_once() -> None:
    values = average_by_image(torch.tensor([1.0, 2.0, 6.0]), ["a", "b", "a"])
    assert values.tolist() == [3.5, 2.0] and estimate(values).mean == 2.75


def test_memorisation_is_the_difference_of_two_loss_decreases() -> None:
    rng = np.random.default_rng(7)
    before, after = rng.normal(size=(2, 2, 9))
    after -= [[0.5], [2.0]]  # the loss falls more on trained images, which come second
    pairs = [(torch.tensor(before[side]), torch.tensor(after[side])) for side in range(2)]
    falls = before - after
    mirrored = memorised(pairs[0], pairs[1], "mirrored")
    paired = stats.ttest_rel(falls[1], falls[0]).confidence_interval(0.95)
    assert (mirrored.low, mirrored.high) == pytest.approx((paired.low, paired.high), rel=1e-9)
    others = memorised(pairs[0], pairs[1], "held-out")
    error = (falls[0].var(ddof=1) / 9 + falls[1].var(ddof=1) / 9) ** 0.5
    assert others.more == pytest.approx(mirrored.more, rel=1e-12) == pytest.approx(falls[1].mean() - falls[0].mean())
    assert others.high - others.more == pytest.approx(stats.t.ppf(0.975, 8) * error, rel=1e-9)


@pytest.mark.parametrize(("kind", "seed"), [("equal", 8), ("walk", 9)])
def test_a_constant_loss_seldom_looks_worse_twice_in_a_row(kind: str, seed: int) -> None:
    """docs/validation.md quotes these rates: 300 runs of 20 validations without a true difference."""
    longest = []
    for losses_FG in torch.tensor(runs_without_differences(20, 12, kind, seed)[:300]):
        best, in_a_row, most = 0, 0, 0
        for i in range(1, len(losses_FG)):
            best = i if losses_FG[i].mean() < losses_FG[best].mean() else best
            in_a_row = in_a_row + 1 if is_clearly_worse(losses_FG[i], losses_FG[best], i) else 0
            most = max(most, in_a_row)
        longest.append(most)
    rates = [sum(most >= patience for most in longest) / len(longest) for patience in (1, 2, 3)]
    assert rates[1] < 0.05 and rates[2] < 0.02
    assert rates[0] > 0.05  # a single one is no reason to stop
