"""Configurations of other trainers become options here, as docs/come_over.md counts them."""

import argparse
import importlib
import json
import re
from pathlib import Path

import pytest

from library.architectures.scripts import list_scripts
from library.training.command_line.cli import normalize
from library.training.command_line.option_checks import check_values
from library.training.config_file import read_config
from library.translation.writing import TranslatedFiles, render_files
from tests.contracts.other_trainers import DATA, PAGE, START, Example, count, find_example, list_examples, render_table

LINES = json.loads((DATA / "lines_of_other_trainers.json").read_text(encoding="utf-8"))
EXAMPLES = list_examples()
LEAST = 0.88


def test_the_table_of_the_page_is_what_the_translation_counts() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = list(render_table())
    assert page[page.index(START) :].splitlines() == lines
    share = re.search(r"([\d.]+)% of the settings", lines[-1])
    assert len(EXAMPLES) >= 40 and share is not None and float(share[1]) >= 100 * LEAST


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.path)
def test_each_claim_names_the_line_of_the_other_trainer(example: Example) -> None:
    configuration_program = {"fluxgym": "sd_scripts"}.get(example.program, example.program)
    claimed = [o.name for o in example.translate().outcomes if o.how in ("equal", "converted")]
    assert claimed and [name for name in claimed if name not in LINES[configuration_program]] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.path)
def test_the_script_accepts_every_line(example: Example, tmp_path: Path) -> None:
    translation = example.translate()
    files = TranslatedFiles(tmp_path / "run.toml")
    for path, text in render_files(translation, Path(example.path), files).items():
        path.write_text(text, encoding="utf-8")
    parser = importlib.import_module(translation.script.removesuffix(".py")).setup_parser()
    config = read_config(files.config, {action.dest: action for action in parser._actions})
    assert all("max_token_length" in warning for warning in config.warnings)
    kind = next(script.options for script in list_scripts() if script.name == translation.script)
    paths = [name for name, declared in kind.declarations().items() if declared.path]  # are not on this machine
    given = {name: value for name, value in config.values.items() if name not in paths}
    check_values(kind.from_args(normalize(argparse.Namespace(**{**kind.defaults(), **given}))))


def test_nothing_is_dropped_in_silence() -> None:
    """Every setting of a file has an outcome, and each without an equal says what happens instead."""
    for example in EXAMPLES:
        outcomes = example.translate().outcomes
        assert all(outcome.text for outcome in outcomes if outcome.how == "missing")
    flux = find_example("ostris/ai-toolkit", "lora_flux_24gb").translate()
    assert sum(count(flux).values()) == len(flux.outcomes) == 42
