"""Texts from files cannot steer a terminal; JSON and misspelt names."""

import io
import json
import logging
from pathlib import Path

import pytest

from library.base.json_text import InvalidJson, parse_json
from library.base.suggestions import did_you_mean, nearby, nearest_name
from library.base.terminal import EscapedTexts, ask, print_error, print_json, print_line


def test_controls_and_what_reorders_a_line_are_escaped_and_lines_kept(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("a\x1b[2J\r\x07\x9b\x7f\n\tb 猫 👩\u200d🎨 \u202etxt.exe \u2028 caf\udce9")
    shown = "a\\x1b[2J\\x0d\\x07\\x9b\\x7f\n\tb 猫 👩\u200d🎨 \\u202etxt.exe \\u2028 caf\\udce9\n"
    assert capsys.readouterr().out == shown
    print_error(ValueError("\x1b]0;title"))
    assert capsys.readouterr().err == "error: \\x1b]0;title\n"


def test_a_terminal_without_a_character_shows_a_question_mark() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="cp1252")
    print_line("é 猫 \udce9", stream, end="|")
    assert written.getvalue() == b"\xe9 ? \\udce9|"


def test_a_question_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "yes")
    assert ask("use \x1b[31m? ") == "yes" and asked == ["use \\x1b[31m? "]


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"\x7f\x1b\x9b": "猫 \u202e \ud800"}
    print_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == value and text.isascii() and text.strip().isprintable()


def test_a_traceback_in_the_log_is_escaped() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(EscapedTexts())
    logger = logging.Logger("a test")
    logger.addHandler(handler)
    try:
        raise ValueError("\x1b[31m")
    except ValueError as error:
        logger.error("\x07%s", "\x1b", exc_info=error)
    written = stream.getvalue()
    assert written.startswith("\\x07\\x1b\nTraceback") and written.endswith("ValueError: \\x1b[31m\n")


# JSON texts that Python's own parser accepts wrongly or fails on with an exception other than ValueError.


@pytest.mark.parametrize("text", ['{"a": [1, "ä\\ud83d\\ude00"]}', '{"a": [1, "ä😀"]}'])
def test_surrogate_pairs_are_decoded_to_characters(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == parse_json(text.encode("utf-16")) == {"a": [1, "ä😀"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
        ("1" * 5000, "a number of thousands of digits"),
        ("{", "Expecting property name"),
        (b'"\xff"', "can't decode byte 0xff"),
    ],
)
def test_invalid_texts_are_refused_with_the_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(InvalidJson, match=reason):
        parse_json(text)


# The known name or file that is nearest to a misspelt one.

KNOWN = ["AdamW", "AdamW8bit", "Lion", "Prodigy"]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("adamw", "AdamW"), ("AdamW_8bit", "AdamW8bit"), ("LIONS", "Lion"), ("sgd", None), ("", None)],
)
def test_the_nearest_name_is_found_ignoring_case(typed: str, nearest: str | None) -> None:
    assert nearest_name(typed, iter(KNOWN)) == nearest
    assert did_you_mean(typed, KNOWN) == (f" (did you mean {nearest}?)" if nearest else "")


def test_the_required_similarity_can_be_set() -> None:
    assert nearest_name("Prod", KNOWN) == "Prodigy"  # 2 x 4 of 4 + 7 letters, 0.73
    assert nearest_name("Prod", KNOWN, least=0.75) is None


def test_the_nearest_path_is_a_folder_if_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "my_cats").mkdir()
    (tmp_path / "my_cat.zip").touch()
    assert nearby(tmp_path / "my_cat.zap") == f"; did you mean {tmp_path / 'my_cat.zip'}?"
    assert nearby(tmp_path / "my_cat.zap", is_folder=True) == f"; did you mean {tmp_path / 'my_cats'}?"
    assert nearby(tmp_path / "dogs") == ""
    assert nearby(tmp_path / "dogs" / "10_dog") == f"; only {tmp_path} exists"
