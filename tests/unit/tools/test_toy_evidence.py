"""Tables of toy experiments show medians and ranges over seeds; figures that exist are not made again."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.results_page import put_into
from benchmarks.toys import evidence
from benchmarks.toys.check_adapter import read_shares
from benchmarks.toys.experiments import merging, repa

PAGE = "# Results\n\n## First\n\ntext\n\n## Not measured yet\n\nmuch\n"


class Made:
    """An experiment whose figures are known."""

    __doc__ = "Two rows."
    COLUMNS = ("shape", "colour")

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def run(self, seed: int, folder: Path) -> dict[str, tuple[float, ...]]:
        self.seeds.append(seed)
        (folder / "drawn.txt").write_text(str(seed))
        return {"before": (0.0, 0.5), "after": (seed * seed / 10, 1 / seed)}


def test_each_cell_is_the_median_of_the_seeds_with_their_range(tmp_path: Path) -> None:
    experiment = Made()
    figures = [evidence.measure(experiment, seed, tmp_path) for seed in (3, 1, 2)]
    lines = list(evidence.describe("made", experiment, figures))
    assert lines[-2:] == ["| before | 0 % | 50 % |", "| after | 40 % (10 to 90) | 50 % (33 to 100) |"]
    assert "Two rows." in lines and lines[-4:-2] == ["| | shape | colour |", "|---|---|---|"]
    assert (tmp_path / "seed_2" / "drawn.txt").read_text() == "2"


def test_a_seed_with_figures_is_not_run_again(tmp_path: Path) -> None:
    experiment = Made()
    first, again = (evidence.measure(experiment, 2, tmp_path) for _ in range(2))
    assert experiment.seeds == [2]
    assert [tuple(row) for row in again.rows.values()] == [tuple(row) for row in first.rows.values()]


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[1]",
        "{}",
        '{"rows": {"a": [0.5]}, "cpu_seconds": 1}',
        '{"rows": {"a": ["b", 1]}, "cpu_seconds": 1}',
    ],
)
def test_figures_of_another_program_are_named_and_kept_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    experiment = Made()
    monkeypatch.setattr(evidence, "load_experiment", lambda name: experiment)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    foreign = tmp_path / "merging" / "seed_3.json"
    foreign.parent.mkdir()
    foreign.write_text(content)
    assert evidence.main(["quickstart", "merging", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"{foreign} does not have the figures" in message and "--output" in message
    assert foreign.read_text() == content and experiment.seeds == []


def test_seeds_with_different_rows_give_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "load_experiment", lambda name: Made())
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "page.md")
    older = tmp_path / "merging" / "seed_1.json"
    older.parent.mkdir()
    older.write_text('{"rows": {"before": [0.0, 0.5]}, "cpu_seconds": 1}')
    assert evidence.main(["merging", "--output", str(tmp_path)]) == 1
    assert "have different rows" in capsys.readouterr().err and not (tmp_path / "page.md").exists()


def test_a_new_table_becomes_a_section_and_is_replaced_afterwards() -> None:
    page = put_into(PAGE, "made", ["| old |"], "Made on the toy world")
    assert page.startswith(
        "# Results\n\n## First\n\ntext\n\n## Made on the toy world\n\n<!-- made: begin -->\n| old |\n"
    )
    assert page.endswith("<!-- made: end -->\n\n## Not measured yet\n\nmuch\n")
    assert put_into(page, "made", ["| new |"]) == page.replace("old", "new")


@pytest.mark.parametrize("name", evidence.list_experiments())
def test_every_experiment_says_what_it_compares(name: str) -> None:
    experiment = evidence.load_experiment(name)
    assert experiment.__doc__ and experiment.COLUMNS and callable(experiment.run)
    assert f"<!-- {name}: begin -->" in getattr(experiment, "PAGE", evidence.PAGE).read_text(encoding="utf-8")


def test_the_shares_that_check_adapter_prints_are_read_back() -> None:
    printed = """a red star
  strength    0: shape 12.5%, colour 100.0%, radius 9.1 px, as asked 0.0%
  strength   -1: shape 50.0%, colour 25.0%, radius unknown, as asked 3.1%, differs by 4.0 of 255
  rank correlation of strength and radius: 0.94, 64 images
a blue star
  strength    1: shape 0.0%, colour 0.0%, radius unknown, as asked 0.0%
"""
    assert read_shares(printed) == {
        "a red star": {0.0: (0.125, 1.0, 0.0), -1.0: (0.5, 0.25, pytest.approx(0.031))},
        "a blue star": {1.0: (0.0, 0.0, 0.0)},
    }


def random_changes(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two changes (9, 12) of rank 3."""
    rng = np.random.default_rng(seed)
    first, second = (torch.tensor(rng.normal(size=(9, 3)) @ rng.normal(size=(3, 12))) for _ in range(2))
    return first, second


def test_projection_to_the_null_space_leaves_the_least_squares_residual() -> None:
    first, second = random_changes(1)
    projected = merging.project(first, second).numpy()
    solved, *_ = np.linalg.lstsq(first.numpy().T, second.numpy().T, rcond=1e-9)
    np.testing.assert_allclose(projected, second.numpy() - (first.numpy().T @ solved).T, atol=1e-10)
    assert np.abs(projected).max() > 0.1


def test_ties_averages_the_largest_values_with_the_elected_sign() -> None:
    changes = [change.numpy() for change in random_changes(2)]
    kept = [np.where(np.abs(c) >= np.sort(np.abs(c), axis=None)[-22], c, 0.0) for c in changes]  # 20 % of 108
    expected = np.zeros((9, 12))
    for place in np.ndindex(9, 12):
        values = [change[place] for change in kept]
        agreeing = [value for value in values if value * sum(values) > 0]
        expected[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    np.testing.assert_allclose(merging.ties(0.2)(*random_changes(2)).numpy(), expected, atol=1e-12)
    assert 22 < np.count_nonzero(expected) <= 44


def negative_cosine(hidden: np.ndarray, features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the loss of alignment, shape B: hidden states are (B, C, 2, 2), features (B, K, 8, 8)."""
    losses = np.zeros((len(hidden), 2, 2))
    for b, row, column in np.ndindex(losses.shape):
        feature = features[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean((1, 2))
        projected = weight @ hidden[b, :, row, column] + bias
        losses[b, row, column] = -projected @ feature / np.sqrt(projected @ projected * (feature @ feature))
    return losses.mean((1, 2))


def test_alignment_is_the_negative_cosine_and_its_weight_scales_the_gradient_of_hidden_states() -> None:
    rng = np.random.default_rng(3)
    hidden, features = rng.normal(size=(3, 6, 2, 2)), rng.normal(size=(3, 5, 8, 8))
    projector = torch.nn.Linear(6, 5).double()
    weight, bias = rng.normal(size=(5, 6)), rng.normal(size=5)
    projector.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    hidden_BCHW = torch.tensor(hidden, requires_grad=True)
    losses_B = repa.align(projector, 0.5, hidden_BCHW, torch.tensor(features))
    expected = negative_cosine(hidden, features, weight, bias)
    np.testing.assert_allclose(losses_B.detach().numpy(), expected, atol=1e-12)
    losses_B.sum().backward()
    step = np.zeros_like(hidden)
    step[1, 2, 0, 1] = 1e-6
    change = negative_cosine(hidden + step, features, weight, bias) - negative_cosine(
        hidden - step, features, weight, bias
    )
    assert hidden_BCHW.grad[1, 2, 0, 1].item() == pytest.approx(0.5 * change[1] / 2e-6, rel=1e-6)
    moved = weight.copy()
    moved[4, 2] += 1e-6
    change = negative_cosine(hidden, features, moved, bias).sum() - expected.sum()
    assert projector.weight.grad[4, 2].item() == pytest.approx(change / 1e-6, rel=1e-4)


def test_a_step_adds_the_alignment_of_the_middle_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    latents_BCHW = torch.tensor(rng.normal(size=(2, 4, 2, 2))).float()
    features = {name: torch.tensor(rng.normal(size=(96, 8, 8))).float() for name in ("a.png", "b.png")}
    weight, bias = rng.normal(size=(96, 96)), rng.normal(size=96)
    denoiser = SimpleNamespace(mid_block=torch.nn.Conv2d(4, 96, 1))
    hidden_BCHW = denoiser.mid_block(latents_BCHW).detach()
    monkeypatch.setattr(
        repa.losses,
        "compute_losses",
        lambda context, *_: context.models.denoiser.mid_block(latents_BCHW).mean((1, 2, 3)),
    )
    alignment = repa.Alignment(0.5, features, seed=1)
    alignment.projector = torch.nn.Sequential(torch.nn.Linear(96, 96))
    alignment.projector[0].load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    context, batch = (
        SimpleNamespace(models=SimpleNamespace(denoiser=denoiser)),
        SimpleNamespace(keys=["x/b.png", "a.png"]),
    )
    losses_B = alignment.compute_losses(context, None, batch, None, None)
    stacked = torch.stack([features["b.png"], features["a.png"]]).numpy()
    added = negative_cosine(hidden_BCHW.numpy(), stacked, weight, bias)
    np.testing.assert_allclose(losses_B.detach(), hidden_BCHW.mean((1, 2, 3)).numpy() + added, atol=1e-5)
    assert alignment.cosines == [pytest.approx(-added.mean(), abs=1e-5)]
    assert not denoiser.mid_block._forward_hooks
