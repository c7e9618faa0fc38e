"""Parsing of the emphasis notation in captions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.models.clip.emphasis import parse_emphasis

CASES = {
    "a cat": [("a cat", 1.0)],
    "a (red) cat": [("a ", 1.0), ("red", 1.1), (" cat", 1.0)],
    "a ((red)) cat": [("a ", 1.0), ("red", 1.1 * 1.1), (" cat", 1.0)],
    "a (red:1.3) cat": [("a ", 1.0), ("red", 1.3), (" cat", 1.0)],
    "a (red : .5 ) cat": [("a ", 1.0), ("red ", 0.5), (" cat", 1.0)],
    "[dull] cat": [("dull", 1 / 1.1), (" cat", 1.0)],
    "(a [b] c:2)": [("a ", 2.0), ("b", 2 / 1.1), (" c", 2.0)],
    "(a (b:1.5) c)": [("a ", 1.1), ("b", 1.5 * 1.1), (" c", 1.1)],
    r"a \(film\) \[x\] \\": [("a (film) [x] \\", 1.0)],
    "never (closed [here": [("never ", 1.0), ("closed ", 1.1), ("here", 1.1 / 1.1)],
    "never) opened]": [("never) opened]", 1.0)],
    "ratio 16:9": [("ratio 16:9", 1.0)],
    "smile :) :1.5)": [("smile :) :1.5)", 1.0)],
    "[square:1.5] stays": [("square:1.5", 1 / 1.1), (" stays", 1.0)],
    "": [],
    "()": [],
}


@pytest.mark.parametrize("caption", CASES)
def test_a_caption_is_split_into_weighted_pieces(caption):
    actual, expected = parse_emphasis(caption), CASES[caption]
    assert [text for text, _ in actual] == [text for text, _ in expected]
    assert [weight for _, weight in actual] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@given(st.text(alphabet="ab ,:.1()[]\\"))
def test_only_notation_is_removed_from_the_text(caption):
    text_of_pieces = "".join(text for text, _ in parse_emphasis(caption))
    assert [c for c in text_of_pieces if c in "ab ,"] == [c for c in caption if c in "ab ,"] or ":" in caption


@given(st.text(alphabet="ab ,é:.1"))
def test_a_caption_without_brackets_is_one_piece_of_weight_1(caption):
    assert parse_emphasis(caption) == ([(caption, 1.0)] if caption else [])
