"""Labels of contact sheets break at words."""

import pytest

from library.training.offline.contact_sheet import wrap


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat on a sofa", ["a cat on a", "sofa"]),
        ("1: mycat,\na  cat", ["1: mycat,", "a cat"]),
        ("of an_overlong_name here", ["of", "an_overlon", "g_name", "here"]),
        ("", [""]),
    ],
)
def test_lines_end_at_words_unless_a_word_is_too_long(text: str, lines: list[str]) -> None:
    assert wrap(text, lambda line: len(line) <= 10) == lines
