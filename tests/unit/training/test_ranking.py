"""Ranking the adapters of a sweep; the error rate of "significantly worse" covers repeated looks."""

from math import nan
from pathlib import Path

import pytest
import torch

from library.training.report_page.page import read_data
from library.training.sweep.ranking import MeasuredAdapter, clearly_worse, format_ranking, rank, rank_and_write
from library.training.sweep.worker import Standing


def measured(label: str, losses_G: list[float] | None, ended: str = "") -> MeasuredAdapter:
    return MeasuredAdapter(label, 8, losses_G, ended, f"{label}.safetensors")


def test_adapters_are_sorted_by_loss_with_unmeasured_ones_last() -> None:
    common_G = torch.randn(9, generator=torch.Generator().manual_seed(81), dtype=torch.float64) + 5
    wobble_G = 0.01 * torch.randn(9, generator=torch.Generator().manual_seed(82), dtype=torch.float64)
    ranking = rank(
        [
            measured("unmeasured", None, "its losses were not finite"),
            measured("worse", (common_G + 0.2 + wobble_G).tolist()),
            measured("broken", [nan] * 9),
            measured("close", (common_G + wobble_G).tolist()),
            measured("best", (common_G - 0.0001).tolist()),
        ]
    )
    assert [row.measured.label for row in ranking.rows][2:] == ["worse", "broken", "unmeasured"]
    verdicts = {row.measured.label: row.compared and row.compared.is_worse for row in ranking.rows}
    assert verdicts == {"best": False, "close": False, "worse": True, "broken": True, "unmeasured": None}
    first, second = (row.measured.label for row in ranking.rows[:2])
    assert ranking.verdict == f"{first} has the lowest loss, not significantly lower than {second}"
    lines = format_ranking(ranking)
    assert len(lines) == 6 and lines[3].split()[-1] == "yes" and lines[5].endswith("its losses were not finite")


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([None, None], "nothing is ranked: no adapter has validation losses"),
        ([[1.0], [2.0]], "a single image tells no difference from chance"),
        ([[1.0, 2.0, 3.0], [2.0, 3.1, 4.0]], "a0 is significantly better than every other adapter"),
    ],
)
def test_the_verdict_on_a_ranking(losses: list[list[float] | None], verdict: str) -> None:
    assert rank([measured(f"a{i}", losses_G) for i, losses_G in enumerate(losses)]).verdict.startswith(verdict)


def test_page_and_log_name_the_word_by_which_nothing_is_ranked(tmp_path: Path) -> None:
    losses = {"a": 1.0, "b": 2.0}
    runs = [Standing(label, 8, 8, losses, "", f"{label}.safetensors") for label in ("l1", "l2")]
    lines = rank_and_write(runs, "cat", tmp_path / "cat-sweep.html", ["loss_type"], {}, {})
    verdict = "nothing is ranked: loss_type changes the held-out images or what their losses mean"
    assert lines == [f"sweep: {verdict}; the ranking is {tmp_path / 'cat-sweep.html'}"]
    page = read_data((tmp_path / "cat-sweep.html").read_text(encoding="utf-8"))
    assert page["verdict"] == verdict and all(row["compared"] is None for row in page["rows"])


@pytest.mark.slow
def test_adapters_that_are_equally_good_are_seldom_dropped() -> None:
    """Four adapters that differ by chance alone, ranked 15 times: in at most 5 % of sweeps one is dropped."""
    generator, num_sweeps, dropped = torch.Generator().manual_seed(83), 300, 0
    for _ in range(num_sweeps):
        images_G = torch.randn(10, generator=generator, dtype=torch.float64)
        for look in range(1, 16):
            own_AG = images_G + 0.1 * torch.randn(4, 10, generator=generator, dtype=torch.float64)
            if clearly_worse({str(i): row.tolist() for i, row in enumerate(own_AG)}, 4, look):
                dropped += 1
                break
    assert dropped / num_sweeps <= 0.05 + 0.025  # two standard errors of the share


def test_clearly_worse_or_nan_adapters_are_dropped_and_later_looks_need_more_evidence() -> None:
    images_G = torch.arange(8.0, dtype=torch.float64)
    wobble_G = 0.02 * torch.randn(8, generator=torch.Generator().manual_seed(84), dtype=torch.float64)
    losses = {
        "nan": [1.0] * 7 + [nan],
        "best": images_G.tolist(),
        "worse": (images_G + 0.5 + wobble_G).tolist(),
        "slightly": (images_G + 0.025 + wobble_G).tolist(),
    }
    assert clearly_worse(losses, 4, 1) == ["nan", "worse", "slightly"]
    assert clearly_worse(losses, 4, 40) == ["nan", "worse"]
    assert clearly_worse({"nan": losses["nan"]}, 2, 1) == []
