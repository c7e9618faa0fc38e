"""Kinds of network arguments, in addition to those of library/options/kinds.py."""

import ast
import re
from dataclasses import dataclass, replace
from typing import Any

from library.base.errors import UserError
from library.options.kinds import BOOL, Kind, number, parse_text, whole
from library.options.network_args import TRUE_WORDS

FALSE_WORDS = ("false", "0", "no", "n", "off")


@dataclass(frozen=True)
class Selection:
    """Selected block numbers; None selects all blocks."""

    indices: frozenset[int] | None = None

    def has(self, index: int) -> bool:
        return self.indices is None or index in self.indices


def parse_switch(text: str) -> bool:
    """Parse True or False in any common spelling."""
    word = text.strip().lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(text)
    return word in TRUE_WORDS


def parse_selection(text: str) -> Selection:
    """Parse `all`, `none`, or comma-separated block numbers and ranges such as 0-3,7."""
    text = text.replace(" ", "").lower()
    if text == "all":
        return Selection()
    if text in ("", "none"):
        return Selection(frozenset())
    indices: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", piece)
        if match is None:
            raise UserError(f"expected all, none, or numbers and ranges such as 0-3,7; {piece!r} is none")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"the range {piece} runs backwards")
        indices.update(range(first, last + 1))
    return Selection(frozenset(indices))


def list_of(item: Kind) -> Kind:
    """Return the kind of comma-separated values, optionally in square brackets; an empty item is 0."""

    def parse(text: str) -> tuple[Any, ...]:
        text = text.replace(" ", "").removeprefix("[").removesuffix("]")
        return tuple(parse_text(part or "0", item) for part in text.split(","))

    return replace(item, fits=lambda v: True, convert=tuple, parse=parse, is_list=True)


def by_expression(item: Kind) -> Kind:
    """Return the kind of comma-separated `expression=value`. An expression cannot contain a comma."""
    return Kind(
        "expression=value with commas between them",
        parse=lambda text: tuple((expression, parse_text(value, item)) for expression, value in _expressions(text)),
    )


def parse_patterns(text: str) -> tuple[str, ...]:
    """Parse regular expressions: a single one, quoted or not, or a Python list of strings."""
    try:
        # sd-scripts takes Python literals. A bare expression, which is none, is accepted too.
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    patterns = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError("expected regular expressions, several as in ['.*attn.*', '.*mlp.*']")
    for pattern in patterns:
        _check_expression(pattern)
    return patterns


def _expressions(text: str) -> list[tuple[str, str]]:
    """Return (regular expression, text after its last equals sign) of each comma-separated item."""
    pairs = []
    for item in text.split(","):
        # The last equals sign separates, since an expression can contain others.
        expression, equals, value = item.strip().rpartition("=")
        if not equals or not expression:
            raise UserError(f"expected expression=value with commas between them; {item!r} has no '='")
        _check_expression(expression)
        pairs.append((expression, value))
    return pairs


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from None


SWITCH = replace(BOOL, name=f"True or False, one of {', '.join(TRUE_WORDS + FALSE_WORDS)}", parse=parse_switch)
RANK, UNIT = whole(0), whole(1)  # rank 0 skips the module
FACTOR = replace(whole(-1), name="a whole number from 1, or -1", fits=lambda v: v == -1 or UNIT.fits(v))
NUMBER, POSITIVE = number(0), number(above=0)
RANKS, NUMBERS = list_of(RANK), list_of(NUMBER)
RANKS_BY_EXPRESSION, NUMBERS_BY_EXPRESSION = by_expression(RANK), by_expression(NUMBER)
PATTERNS = Kind("regular expressions", parse=parse_patterns)
SELECTION = Kind("all, none, or numbers and ranges such as 0-3,7", parse=parse_selection)
