"""Find options that are given and have no effect in a run, by what their declarations say they need."""

from collections.abc import Iterator, Mapping
from typing import Any

from library.options.base import Options


def asks(value: Any) -> bool:
    """Whether a value asks for something: front ends also write what the user left empty, as false, 0, "" or []."""
    return bool(value > 0) if isinstance(value, int | float) else bool(value)


def is_set(value: Any, default: Any) -> bool:
    """Whether a value differs from the default and from what front ends write for nothing."""
    return value != default and value not in (None, False, "", 0, "no", [])


def is_given(value: Any, default: Any) -> bool:
    """Whether an option of which 0 is a value too was given."""
    return bool(value != default and value != "")


def unused(options: Options, ignores: Mapping[str, str]) -> Iterator[str]:
    """A line for every option that is given and does nothing in this run.

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
