"""Detection of options that have no effect in a run, according to their declarations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.options.base import Options
from library.options.declared import Declared


def is_requested(value: Any) -> bool:
    """Return True if a value requests something. Front ends write false, 0, "" or [] for empty fields.

    Negative integers request nothing; negative floats do.
    """
    return bool(value > 0) if isinstance(value, int) else bool(value)


def is_set(value: Any, default: Any) -> bool:
    """Return True if a value differs from the default and from the values that front ends write for empty fields."""
    return value != default and value not in (None, False, "", 0, "no", [])


def is_given(value: Any, default: Any) -> bool:
    """Return True if an option that accepts 0 has been given; a negative integer means never."""
    return bool(value != default and value != "") and not (isinstance(value, int) and value < 0)


def find_unused(options: Options, ignores: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for every given option that has no effect in this run.

    `ignores` maps options without effect for the base model to the reason.
    """
    values, defaults = options.flat(), type(options).defaults()
    for name, declared in type(options).declarations().items():
        if not is_set(values[name], defaults[name]):
            continue
        reason = ignores.get(name)
        end = f": {reason}" if reason is not None else explain_unused(declared, values, defaults)
        if end is not None:
            yield f"--{name} has no effect{end}"


def explain_unused(declared: Declared, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
    """Return why a given option has no effect, as a continuation of "has no effect"; None if it has one."""
    if declared.ignored is not None:
        return f": {declared.ignored}"
    if declared.unless is not None and is_given(values[declared.unless], defaults[declared.unless]):
        return f" with --{declared.unless}"
    line = unmet(declared.needs.names, values)
    return f" {line}" if line else None


def unmet(needs: tuple[str, ...], values: Mapping[str, Any]) -> str | None:
    """Describe the unmet needs, as a continuation of "has no effect"; None if at least one is met or there are none."""
    known = [need for need in needs if need.partition("=")[0] in values]
    if not known or any(is_met(need, values) for need in known):
        return None
    other, equals, accepted = known[0].partition("=")
    if equals:
        accepted = accepted.replace("|", " or ")
        if values[other] is None:
            return f"without --{other} {accepted}"
        return f"with --{other} {values[other]}; it is for {accepted}"
    return f"without {describe_needs(known)}"


def describe_needs(needs: Sequence[str]) -> str:
    """Format alternative needs as command-line options."""
    *others, last = (f"--{need.replace('=', ' ').replace('|', ' or ')}" for need in needs)
    return f"{', '.join(others)} or {last}" if others else last


def is_met(need: str, values: Mapping[str, Any]) -> bool:
    """Return True if a need is met: the option is requested, or has one of the values after "="."""
    other, equals, accepted = need.partition("=")
    return str(values[other]) in accepted.split("|") if equals else is_requested(values[other])
