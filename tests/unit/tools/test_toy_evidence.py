"""Tables of toy experiments show means with standard errors over seeds; figures that exist are not made again."""

from pathlib import Path

import pytest

from benchmarks.results_page import put_into
from benchmarks.toys import evidence
from benchmarks.toys.check_adapter import read_shares

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


def test_each_cell_is_the_mean_of_the_seeds_with_its_standard_error(tmp_path: Path) -> None:
    experiment = Made()
    figures = [evidence.measure(experiment, seed, tmp_path) for seed in (3, 1, 2)]
    lines = list(evidence.describe("made", experiment, figures))
    assert lines[-2:] == ["| before | 0.0 % | 50.0 % |", "| after | 46.7 ± 23.3 % | 61.1 ± 20.0 % |"]
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
    assert f"<!-- {name}: begin -->" in evidence.PAGE.read_text(encoding="utf-8")


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
