"""The tables of docs/memory.md match the output of benchmarks/plan_models.py."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.plan_models import CARDS, TABLES, Table, rows_of

PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
# A row takes up to 18 CPU seconds. Models that are not listed are nightly.
SLOW = ("Anima", "FLUX.1")

pytestmark = pytest.mark.usefixtures("fresh_process")  # parsing options sets up logging


def lines_on_page(table: Table) -> list[str]:
    match = re.search(
        f"<!-- plan_models: {table.name} -->\n(.*?)<!-- end: {table.name} -->", PAGE.read_text("utf-8"), re.DOTALL
    )
    assert match is not None
    return match[1].splitlines()


def mark(name: str) -> pytest.MarkDecorator:
    return pytest.mark.slow if name in SLOW else pytest.mark.nightly


@pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, name, marks=mark(name), id=f"{table.name}-{name}")
        for table in TABLES
        for name in table.models
    ],
)
def test_the_rows_of_a_model_match_the_planner(table: Table, name: str) -> None:
    on_page = [line for line in lines_on_page(table) if is_row_of(line, name)]
    assert on_page == list(rows_of(name, table.formats, CARDS))


def is_row_of(line: str, name: str) -> bool:
    return re.match(rf"\| {re.escape(name)}, \d+ px, ", line) is not None


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_model_and_format_has_its_row(table: Table) -> None:
    head, rule, *rows = lines_on_page(table)
    assert head == f"| base model | {' | '.join(CARDS)} |" and rule.count("---") == len(CARDS) + 1
    assert names_of(rows) == [f"{name}, {form}" for name in table.models for form in table.formats]


def names_of(rows: Sequence[str]) -> list[str]:
    return [re.sub(r", \d+ px", "", row.split(" | ")[0].removeprefix("| ")) for row in rows]


def test_tables_are_replaced_in_place() -> None:
    table = Table("mine", (), ())
    page = "before\n<!-- plan_models: mine -->\nold\n<!-- end: mine -->\nafter"
    assert table.put_into(page, ["| new |"]) == page.replace("old", "| new |")
