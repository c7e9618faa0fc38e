"""Kinds of values: how their text is parsed, which values of TOML and JSON fit, and the words of an error."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeGuard

from library.base.errors import UserError
from library.base.suggestions import did_you_mean

MOST_SHOWN = 80  # characters of a value in an error
ValueType = Literal["flag", "int", "float", "steps", "text", "path", "table"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts; None is no limit."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def has(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Format the range as the end of "a number"."""
        low = "" if self.at_least is None else f" from {self.at_least:g}"
        low += "" if self.above is None else f" above {self.above:g}"
        high = "" if self.at_most is None else f" {'to' if low else 'up to'} {_format_limit(self.at_most)}"
        return low + high + ("" if self.below is None else f" {'to ' if low else ''}below {self.below:g}")


def _format_limit(limit: float | None) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


@dataclass(frozen=True)
class Kind:
    """A type of value: its name in errors, its check of a value of TOML or JSON, and its conversion.

    `parse` turns text into such a value; it raises ValueError, or UserError to say more than "expected" and the name.
    `range` is that of each number of a value.
    """

    name: str
    fits: Callable[[Any], bool] = lambda value: True
    convert: Callable[[Any], Any] = lambda value: value
    parse: Callable[[str], Any] = str
    type: ValueType = "text"
    is_list: bool = False
    range: Range = Range()
    choices: Sequence[Any] = ()


def is_number(value: object) -> TypeGuard[int | float]:
    """Return True for numbers, but not for true and false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Return True for numbers that a float can hold; TOML and JSON have integers beyond that, NaN and infinity."""
    # math.isfinite raises OverflowError for integers that no float can hold.
    return is_number(value) and abs(value) <= sys.float_info.max


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TEXT = Kind("text in quotes", lambda v: isinstance(v, str))
TEXTS = Kind(
    "text in quotes, or a list of such texts",
    lambda v: isinstance(v, str) or (is_texts(v) and bool(v)),
    lambda v: (v,) if isinstance(v, str) else tuple(v),
    is_list=True,
)
BOOL = Kind("true or false", lambda v: isinstance(v, bool), type="flag")
PATH = Kind("a path", parse=Path, type="path")
TABLE = Kind("a table", lambda v: isinstance(v, dict), type="table")


def choice(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda v: v in names, choices=names)


# Cached: a start makes a hundred of them. Typed, because the words of 1 and 1.0 differ.
@lru_cache(maxsize=None, typed=True)
def number(
    at_least: float | None = None, at_most: float | None = None, *, above: float | None = None,
    below: float | None = None, name: str = "a number",
) -> Kind:  # fmt: skip
    """Return the kind of finite numbers in a range; with an upper limit alone, of both signs up to it."""
    limits = Range(at_least, above, at_most, below)
    words = f"{name}{limits}"
    if at_least is None and above is None and at_most is not None:
        limits = Range(-at_most, None, at_most)
    return Kind(words, lambda v: is_finite_number(v) and limits.has(v), float, float, "float", range=limits)


@lru_cache(maxsize=None, typed=True)
def whole(at_least: int | None = None, at_most: int | None = None) -> Kind:
    """Return the kind of whole numbers in a range. A whole float such as 512.0 is one: some front ends write them."""
    real = number(at_least, at_most, name="a whole number")
    return replace(real, fits=lambda v: real.fits(v) and v == int(v), convert=int, parse=int, type="int")


def int_or_float(text: str) -> int | float:
    """Parse a number of steps, or a fraction of the run if it is below 1 or ends in `%`.

    0 is a fraction, as in sd-scripts. So are negative numbers, which the option's range refuses. Raises
    argparse.ArgumentTypeError for anything else, including 1.0 and above with a decimal point, which is ambiguous.
    """
    try:
        if text.strip().isdigit() and int(text) > 0:
            return int(text)
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not share < 1:  # also True for NaN
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of steps or a share of the run below 1.0")
    return share


def steps(at_least: float) -> Kind:
    """Return the kind of a number of steps, or a share of the run below 1."""
    return Kind(
        "a whole number of steps or a share of the run below 1.0", parse=int_or_float, type="steps",
        range=Range(at_least),
    )  # fmt: skip


SHARE, PROBABILITY = number(0, 1), number(0, below=1, name="a chance")


def size(low: int, high: int, order: str) -> Kind:
    """Return the kind of one side or two sides, of which `order` says the order; the value is a pair."""
    side = whole(low, high)
    return Kind(
        f"a side{side.range}, or {order}",
        lambda v: side.fits(v) or (isinstance(v, (list, tuple)) and len(v) == 2 and all(map(side.fits, v))),
        lambda v: (int(v[0]), int(v[1])) if isinstance(v, (list, tuple)) else (int(v), int(v)),
        type="int",
        is_list=True,
        range=side.range,
    )


def explain_unfit(value: Any, kind: Kind, setting: str) -> str | None:
    """Return a sentence if the value of `setting` does not fit."""
    if kind.fits(value):
        return None
    text = repr(value) if len(repr(value)) <= MOST_SHOWN else f"{repr(value)[:MOST_SHOWN]} ..."
    return f"{setting} is {text}{did_you_mean(str(value), kind.choices)}, but must be {kind.name}"


def read_value(value: Any, kind: Kind, setting: str) -> Any:
    """Return a value converted. Raises UserError if it does not fit."""
    if problem := explain_unfit(value, kind, setting):
        raise UserError(problem)
    return kind.convert(value)


def parse_text(text: str, kind: Kind) -> Any:
    """Return the value that a text stands for. Raises UserError with the expected form, without the setting."""
    try:
        value = kind.parse(text)
        if not kind.fits(value):
            raise ValueError(text)
    except UserError:
        raise
    except ValueError:
        raise UserError(f"expected {kind.name}") from None
    return kind.convert(value)
