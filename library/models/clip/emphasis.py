"""The emphasis notation of --weighted_captions: (x) 1.1, (x:1.3), [x] 1/1.1, nested and escaped."""

import re

ROUND, SQUARE = 1.1, 1 / 1.1
PIECE = re.compile(r"\\[()\[\]\\]|[(\[)\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|[\\:]", re.DOTALL)


def parse_emphasis(caption: str) -> list[tuple[str, float]]:
    """Split a caption into (text, weight) pieces without brackets, joining neighbours of equal weight.

    Nested weights multiply. An unclosed bracket extends to the end of the caption; an unopened one is plain text.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # open brackets with the index of their first piece

    def weigh_from(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    def closes(bracket: str) -> bool:
        return bool(opened) and opened[-1][0] == bracket

    for match in PIECE.finditer(caption):
        text, number = match[0], match[1]
        if text in ("(", "["):
            opened.append((text, len(pieces)))
        elif number is not None and closes("("):
            weigh_from(opened.pop()[1], float(number))
        elif text == ")" and closes("("):
            weigh_from(opened.pop()[1], ROUND)
        elif text == "]" and closes("["):
            weigh_from(opened.pop()[1], SQUARE)
        else:
            is_escape = len(text) == 2 and text[0] == "\\"
            pieces.append((text[1] if is_escape else text, 1.0))
    for bracket, start in opened:
        weigh_from(start, ROUND if bracket == "(" else SQUARE)
    return join_equal(pieces)


def join_equal(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined
