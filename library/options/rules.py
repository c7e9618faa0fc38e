"""Holds options to what their declarations say: ranges, and what they need to have an effect."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, TypeGuard

from library.errors import UserError
from library.options.base import RULE, Options, Rule


def asks(value: Any) -> bool:
    """Whether a value asks for something: front ends also write what the user left empty, as false, 0, "" or []."""
    return bool(value > 0) if isinstance(value, int | float) else bool(value)


def is_set(value: Any, default: Any) -> bool:
    """Whether a value differs from the default and from what front ends write for nothing."""
    return value != default and value not in (None, False, "", 0, "no", [])


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_ranges(options: Options) -> None:
    """Raise UserError for the first number that lies where it means nothing, naming its option."""
    values = options.flat()
    for field, _ in type(options).leaves():
        value = values[field.name]
        for number in value if isinstance(value, list) else [value]:
            if is_number(number):
                check_number(field.name, number, field.metadata.get(RULE, Rule()))


def check_number(name: str, number: float, rule: Rule) -> None:
    """Raise UserError where a number of the option `name` is outside its range."""
    if isinstance(number, float) and not isfinite(number):
        raise UserError(f"--{name} is {number}; use a finite number")
    if rule.is_share and not 0 <= number <= 1:
        raise UserError(f"--{name} is {number}; it is a share, use 0 to 1")
    if rule.at_least is not None and number < rule.at_least:
        raise UserError(f"--{name} is {number}; use at least {rule.at_least}, or leave it out")
    if rule.at_most is not None and number > rule.at_most:
        raise UserError(f"--{name} is {number}; use at most {rule.at_most}, or leave it out")


def unused(options: Options, ignores: Mapping[str, str]) -> Iterator[str]:
    """A line for every option that is given and does nothing in this run.

    `ignores` are those that do nothing for the base model, with the reason.
    """
    values, defaults = options.flat(), type(options).defaults()
    for field, _ in type(options).leaves():
        name, rule = field.name, field.metadata.get(RULE, Rule())
        if not is_set(values[name], defaults[name]):
            continue
        why = ignores.get(name) or rule.ignored
        if why is not None:
            yield f"--{name} has no effect: {why}"
        elif rule.unless is not None and is_given(values[rule.unless], defaults[rule.unless]):
            yield f"--{name} has no effect with --{rule.unless}"
        elif line := unmet(rule.needs, values):
            yield f"--{name} has no effect {line}"


def is_given(value: Any, default: Any) -> bool:
    """Whether an option of which 0 is a value too was given."""
    return bool(value != default and value != "")


def unmet(needs: tuple[str, ...], values: Mapping[str, Any]) -> str | None:
    """Which need is not met, to be read after "has no effect"; None where one of them is, or there is none."""
    known = [need for need in needs if need.partition("=")[0] in values]
    if not known or any(is_met(need, values) for need in known):
        return None
    other, equals, wanted = known[0].partition("=")
    if equals:
        return f"with --{other} {values[other]}; it is for {wanted.replace('|', ' or ')}"
    return f"without {' or '.join(f'--{need}' for need in known)}"


def is_met(need: str, values: Mapping[str, Any]) -> bool:
    """Whether an option asks for something, or with "=" is one of the values that stand behind it."""
    other, equals, wanted = need.partition("=")
    return str(values[other]) in wanted.split("|") if equals else asks(values[other])
