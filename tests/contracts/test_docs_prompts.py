"""Prompt files in the documentation and the repository are readable, and every setting is explained."""

from pathlib import Path

import pytest

from library.options.output.prompts import KINDS, LINE_OPTIONS, read_prompts
from tests.contracts.test_docs_commands import ROOT, blocks_of

PAGE = ROOT / "docs" / "previews.md"
SHOWN = [("txt", block) for block in blocks_of(PAGE, "")]
SHOWN += [(language, block) for language in ("toml", "json") for block in blocks_of(PAGE, language)]


@pytest.mark.parametrize("path", [*sorted((ROOT / "configs").glob("*/prompts.txt"))], ids=str)
def test_shipped_prompt_file_is_readable(path: Path) -> None:
    assert read_prompts(path)


@pytest.mark.parametrize(("kind", "block"), SHOWN)
def test_documented_prompts_are_readable(tmp_path: Path, kind: str, block: str) -> None:
    path = tmp_path / f"prompts.{kind}"
    path.write_text(block, encoding="utf-8")
    assert read_prompts(path)


def test_the_page_shows_every_file_format_and_explains_every_setting() -> None:
    assert {kind for kind, _ in SHOWN} == {"txt", "toml", "json"}
    text = PAGE.read_text(encoding="utf-8")
    assert [key for key in KINDS if f"`{key}`" not in text] == []
    assert [letters for letters in LINE_OPTIONS if f"`--{letters}`" not in text] == []
