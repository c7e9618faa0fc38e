"""JSON texts that Python's own parser accepts wrongly or fails on with an exception other than ValueError."""

import pytest

from library.base.json_text import InvalidJson, parse_json


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
