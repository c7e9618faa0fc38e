"""Texts from files cannot steer a terminal, and no encoding of a terminal ends a command."""

import io
import json
import logging

import pytest

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
