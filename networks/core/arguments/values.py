"""The text of single network arguments as typed values; each `parse_` raises UserError saying what is expected."""

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.errors import UserError
from networks.core.protocol import TRUE_WORDS

FALSE_WORDS = ("false", "0", "no", "n", "off")
LR_CURVES: Mapping[str, Callable[[float], float]] = {  # factor by the place of a block in its side, 0 to 1
    "cosine": lambda t: math.sin(math.pi / 2 * (1 - t)),
    "sine": lambda t: math.sin(math.pi / 2 * t),
    "linear": lambda t: t,
    "reverse_linear": lambda t: 1 - t,
    "zeros": lambda t: 0.0,
}


@dataclass(frozen=True)
class LrPreset:
    """A named curve of learning rate factors over the blocks of one side, raised by `offset`."""

    name: str
    offset: float = 0.0


LrWeights = tuple[float, ...] | LrPreset


@dataclass(frozen=True)
class Selection:
    """Numbers of blocks, None for all."""

    indices: frozenset[int] | None = None

    def has(self, index: int) -> bool:
        return self.indices is None or index in self.indices


def parse_bool(text: str) -> bool:
    """Parse True or False from any usual spelling."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise UserError(f"expected True or False, one of {', '.join(TRUE_WORDS + FALSE_WORDS)}")


def parse_rank(text: str) -> int:
    """Parse a rank: a whole number from 0, where 0 leaves the module alone."""
    try:
        rank = int(text)
    except ValueError:
        raise UserError("expected a whole number") from None
    if rank < 0:
        raise UserError("expected 0 or more")
    return rank


def parse_unit(text: str) -> int:
    """Parse a block size: a whole number from 1."""
    if (unit := parse_rank(text)) == 0:
        raise UserError("expected 1 or more")
    return unit


def parse_factor(text: str) -> int:
    """Parse a whole number from 1, or -1."""
    return -1 if text.strip() == "-1" else parse_unit(text)


def parse_number(text: str) -> float:
    """Parse a finite number that is not negative."""
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
    """Parse a chance from 0 up to, but without, 1: at 1 nothing would be trained."""
    number = parse_number(text)
    if number >= 1:
        raise UserError("expected a chance from 0 to below 1")
    return number


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse ranks with commas between them; an empty place is 0."""
    return tuple(parse_rank(item or "0") for item in text.replace(" ", "").split(","))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Parse numbers with commas between them; an empty place is 0."""
    return tuple(parse_number(item or "0") for item in text.replace(" ", "").split(","))


def parse_lr_weights(text: str) -> LrWeights:
    """Parse learning rate factors with commas between them, or a curve such as `cosine` or `sine+0.25`."""
    name, plus, offset = text.replace(" ", "").partition("+")
    if name in LR_CURVES:
        return LrPreset(name, parse_number(offset) if plus else 0.0)
    try:
        return parse_numbers(text)
    except ValueError:
        raise UserError(f"expected numbers with commas between them, or one of {', '.join(LR_CURVES)}") from None


def parse_embedder_ranks(text: str) -> tuple[int, ...]:
    """Parse ranks with commas between them, in brackets or not; an empty place is 0."""
    return parse_ranks(text.strip().removeprefix("[").removesuffix("]"))


def parse_selection(text: str) -> Selection:
    """Parse `all`, `none`, or numbers of blocks and ranges with commas between them: 0-3,7."""
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
    """Parse `expression=rank` with commas between them; an expression has no comma."""
    return tuple((expression, parse_rank(value)) for expression, value in _expressions(text))


def parse_expression_rates(text: str) -> tuple[tuple[str, float], ...]:
    """Parse `expression=rate` with commas between them; an expression has no comma."""
    return tuple((expression, parse_number(value)) for expression, value in _expressions(text))


def parse_patterns(text: str) -> tuple[str, ...]:
    """Parse regular expressions: one as it is or in quotes, several as a list of Python strings."""
    try:
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
    """Return (regular expression, text after its last equals sign)."""
    found = []
    for item in text.split(","):
        expression, equals, value = item.strip().rpartition("=")
        if not equals or not expression:
            raise UserError(f"expected expression=value with commas between them; {item!r} has no '='")
        _check_expression(expression)
        found.append((expression, value))
    return found


def _check_expression(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from None
