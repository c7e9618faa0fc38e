"""Parsers of single network argument values. Each `parse_*` function raises UserError naming the expected form."""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.errors import UserError
from library.network_args import TRUE_WORDS

FALSE_WORDS = ("false", "0", "no", "n", "off")


@dataclass(frozen=True)
class Selection:
    """Selected block numbers; None selects all blocks."""

    indices: frozenset[int] | None = None

    def has(self, index: int) -> bool:
        return self.indices is None or index in self.indices


def parse_bool(text: str) -> bool:
    """Parse True or False in any common spelling."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise UserError(f"expected True or False, one of {', '.join(TRUE_WORDS + FALSE_WORDS)}")


def parse_rank(text: str) -> int:
    """Parse a rank, an integer of at least 0. Rank 0 skips the module."""
    try:
        rank = int(text)
    except ValueError:
        raise UserError("expected a whole number") from None
    if rank < 0:
        raise UserError("expected 0 or more")
    return rank


def parse_unit(text: str) -> int:
    """Parse a block size, an integer of at least 1."""
    if (unit := parse_rank(text)) == 0:
        raise UserError("expected 1 or more")
    return unit


def parse_factor(text: str) -> int:
    """Parse an integer of at least 1, or -1."""
    return -1 if text.strip() == "-1" else parse_unit(text)


def parse_number(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        raise UserError("expected a number") from None
    if not 0 <= number < float("inf"):
        raise UserError("expected a number from 0")
    return number


def parse_power(text: str) -> float:
    """Parse a finite number above 0."""
    if (number := parse_number(text)) == 0:
        raise UserError("expected a number above 0")
    return number


def parse_probability(text: str) -> float:
    """Parse a probability of at least 0 and below 1. At 1 nothing would be trained."""
    number = parse_number(text)
    if number >= 1:
        raise UserError("expected a chance from 0 to below 1")
    return number


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse comma-separated ranks; an empty item is 0."""
    return tuple(parse_rank(item or "0") for item in text.replace(" ", "").split(","))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Parse comma-separated numbers; an empty item is 0."""
    return tuple(parse_number(item or "0") for item in text.replace(" ", "").split(","))


def parse_embedder_ranks(text: str) -> tuple[int, ...]:
    """Parse comma-separated ranks, optionally in square brackets; an empty item is 0."""
    return parse_ranks(text.strip().removeprefix("[").removesuffix("]"))


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


def parse_expression_ranks(text: str) -> tuple[tuple[str, int], ...]:
    """Parse comma-separated `expression=rank` items. An expression cannot contain a comma."""
    return tuple((expression, parse_rank(value)) for expression, value in _expressions(text))


def parse_expression_rates(text: str) -> tuple[tuple[str, float], ...]:
    """Parse comma-separated `expression=rate` items. An expression cannot contain a comma."""
    return tuple((expression, parse_number(value)) for expression, value in _expressions(text))


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


@dataclass(frozen=True)
class ValueForm:
    """The form of a value, for authors of forms: its type, whether it is a list, and its range."""

    type: str  # as of an option: "flag", "int", "float" or "text"
    is_list: bool = False
    minimum: float | None = None
    exclusive_minimum: float | None = None
    exclusive_maximum: float | None = None


FORMS: Mapping[Callable[[str], object], ValueForm] = {  # of parsers; the values of others are texts
    parse_bool: ValueForm("flag"),
    parse_rank: ValueForm("int", minimum=0),
    parse_unit: ValueForm("int", minimum=1),
    parse_factor: ValueForm("int", minimum=-1),
    parse_number: ValueForm("float", minimum=0),
    parse_power: ValueForm("float", exclusive_minimum=0),
    parse_probability: ValueForm("float", minimum=0, exclusive_maximum=1),
    parse_ranks: ValueForm("int", is_list=True, minimum=0),
    parse_numbers: ValueForm("float", is_list=True, minimum=0),
    parse_embedder_ranks: ValueForm("int", is_list=True, minimum=0),
}
