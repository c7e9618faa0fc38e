"""tools/show_metadata.py, run as a command."""

import json
from pathlib import Path

import pytest
import torch

from library.checkpoints.saving import save_safetensors
from tests.unit.tools.adapter_files import METADATA, write
from tools.show_metadata import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.safetensors", 960)


def test_sections_json_dates_and_tags_are_formatted(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(path)]) == 0
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if not line.startswith(" ")] == [
        "model:",
        "training:",
        "hashes:",
        "other:",
    ]
    assert "  modelspec.title: my cat\n" in output
    assert '  ss_network_args:\n    {\n      "conv_dim": "2"\n    }\n' in output
    assert "ss_training_started_at: 1700000000.5 (2023-11-14 22:13:20 UTC)" in output
    tags = output.partition("ss_tag_frequency:\n")[2].splitlines()[:4]
    assert [line.split() for line in tags[:4]] == [["10", "sitting"], ["9", "cat"], ["7", "dog"], tags[3].split()]


def test_only_the_most_common_tags_are_listed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--num_tags", "1"]) == 0
    output = capsys.readouterr().out
    assert "10 sitting" in output and "9 cat" not in output and "and 2 more; --num_tags 3 shows all" in output


def test_one_key_is_printed_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(path), "--key", "ss_network_args"]) == 0
    assert capsys.readouterr().out == METADATA["ss_network_args"] + "\n"


def test_an_unknown_key_is_an_error_that_lists_the_known_keys(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(path), "--key", "ss_dim"]) == 1
    assert "--key ss_dim" in (error := capsys.readouterr().err) and "ss_network_dim" in error


def test_json_output_parses_nested_json_and_keeps_other_texts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() == METADATA.keys()
    assert content["ss_network_args"] == {"conv_dim": "2"} and content["ss_network_dim"] == "4"


def test_metadata_is_never_executed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(path)]) == 0
    assert f"note: {METADATA['note']}" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_control_characters_are_escaped_and_long_texts_shortened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(1)}, {"a": "\x1b[2J", "b": "p" * 5000, "c": "[oops"})
    assert main(["--model", str(tmp_path / "b.safetensors")]) == 0
    output = capsys.readouterr().out
    assert "a: \\x1b[2J\n" in output and f"b: {'p' * 80}... (5000 characters)" in output and "c: [oops" in output


def test_a_file_without_metadata_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    assert main(["--model", str(tmp_path / "b.safetensors")]) == 0
    assert capsys.readouterr().out == "the file has no metadata\n"


@pytest.mark.parametrize(("name", "message"), [("x.ckpt", "only safetensors"), ("y.safetensors", "does not exist")])
def test_files_without_a_header_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.ckpt")
    assert main(["--model", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err
