"""Find options that are given and have no effect in a run, by what their declarations say they need."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.options.base import Options


def asks(value: Any) -> bool:
    """Return True if a value asks for something: front ends also write what was left empty, as false, 0, "" or [].

    A negative count is never, a negative strength is one.
    """
    return bool(value > 0) if isinstance(value, int) else bool(value)


def is_set(value: Any, default: Any) -> bool:
    """Return True if a value differs from the default and from what front ends write for nothing."""
    return value != default and value not in (None, False, "", 0, "no", [])


def is_given(value: Any, default: Any) -> bool:
    """Return True if an option of which 0 is a value too was given; negative counts stand for never."""
    return bool(value != default and value != "") and not (isinstance(value, int) and value < 0)


def unused(options: Options, ignores: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for every option that is given and has no effect in this run.

    `ignores` are those that do nothing for the base model, with the reason.
    """
    values, defaults = options.flat(), type(options).defaults()
    for name, facts in type(options).facts().items():
        if not is_set(values[name], defaults[name]):
            continue
        why = ignores.get(name) or facts.ignored
        if why is not None:
            yield f"--{name} has no effect: {why}"
        elif facts.unless is not None and is_given(values[facts.unless], defaults[facts.unless]):
            yield f"--{name} has no effect with --{facts.unless}"
        elif line := unmet(facts.needs, values):
            yield f"--{name} has no effect {line}"


def unmet(needs: tuple[str, ...], values: Mapping[str, Any]) -> str | None:
    """Describe the needs, to be read after "has no effect"; None where one of them is met, or there is none."""
    known = [need for need in needs if need.partition("=")[0] in values]
    if not known or any(is_met(need, values) for need in known):
        return None
    other, equals, wanted = known[0].partition("=")
    if equals:
        return f"with --{other} {values[other]}; it is for {wanted.replace('|', ' or ')}"
    return f"without {describe_needs(known)}"


def describe_needs(needs: Sequence[str]) -> str:
    """Write what an option needs, one of several, as it is typed."""
    *others, last = (f"--{need.replace('=', ' ').replace('|', ' or ')}" for need in needs)
    return f"{', '.join(others)} or {last}" if others else last


def is_met(need: str, values: Mapping[str, Any]) -> bool:
    """Return True if an option asks for something, or with "=" is one of the values behind it."""
    other, equals, wanted = need.partition("=")
    return str(values[other]) in wanted.split("|") if equals else asks(values[other])
