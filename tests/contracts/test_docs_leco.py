"""LECO prompt files in the documentation and the repository are readable, and every key is explained."""

from pathlib import Path

import pytest

from library.data.concepts.prompts_file import PAIR_KEYS, SLIDER_KEYS, read_prompt_pairs
from tests.contracts.test_docs_commands import ROOT, blocks_of

PAGE = ROOT / "docs" / "train_leco.md"
SHIPPED = sorted((ROOT / "configs" / "leco").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_prompt_file_is_readable(path: Path) -> None:
    assert read_prompt_pairs(path)


@pytest.mark.parametrize("block", blocks_of(PAGE, "toml"))
def test_documented_prompt_file_is_readable(tmp_path: Path, block: str) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(block, encoding="utf-8")
    assert read_prompt_pairs(path)


def test_the_page_shows_the_file_named_in_its_first_command() -> None:
    lines = (ROOT / "configs" / "leco" / "erase.toml").read_text(encoding="utf-8").splitlines()
    plain = [line.partition("#")[0].rstrip() for line in lines if line.partition("#")[0].strip()]
    assert blocks_of(PAGE, "toml")[0].splitlines() == plain


def test_the_page_explains_every_key() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [key for key in (*PAIR_KEYS, *SLIDER_KEYS) if f"`{key}`" not in text] == []
