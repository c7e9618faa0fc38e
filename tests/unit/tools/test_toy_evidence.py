"""Tables of toy experiments show medians and ranges over seeds; figures that exist are not made again."""

from pathlib import Path

import pytest

from benchmarks.results_page import put_into
from benchmarks.toys import evidence

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
