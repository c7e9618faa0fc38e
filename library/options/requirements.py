"""Checks of options against their declarations: unsupported ones, and those that require or exclude others."""

from collections.abc import Collection, Mapping
from typing import Any

from library.base.errors import error_in
from library.options.base import Options
from library.options.no_effect import describe_needs, is_met, is_requested, is_set


def unsupported(options: Options) -> dict[str, str]:
    """Return a line for every requested option that is not supported, by flag."""
    values, defaults = options.flat(), type(options).defaults()
    return {
        f"--{name}": f"--{name} is not supported: {declared.unsupported}"
        for name, declared in type(options).declarations().items()
        if declared.unsupported is not None
        and (is_set(values[name], defaults[name]) if declared.needs.groups else is_requested(values[name]))
        and all(is_met(need, values) for need in declared.needs.names)
    }


def check_requirements(options: Options) -> None:
    """Raise UserError for the first given option that lacks a required one or is excluded by another."""
    values, defaults = options.flat(), type(options).defaults()
    for name, declared in type(options).declarations().items():
        if is_set(values[name], defaults[name]):
            check_required(name, declared.requires, values)
            check_excluded(name, declared.excludes, values)


def check_required(name: str, needs: tuple[str, ...], values: Mapping[str, Any]) -> None:
    """Raise UserError if none of a given option's needs is met."""
    if not needs or any(is_met(need, values) for need in needs):
        return
    other, is_value, _ = needs[0].partition("=")
    current = f", but that is {values[other]}" if is_value else ", which is not set"
    raise error_in(f"--{name}", others=[f"--{need.partition('=')[0]}" for need in needs], cause="needs")(
        f"{flag_with_value(name, values[name])} needs {describe_needs(needs)}{current}",
        f"set it, or leave out --{name}",
    )


def check_excluded(name: str, excludes: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Raise UserError if a given option excludes another option that is also given."""
    for need, reason in excludes.items():
        other = need.partition("=")[0]
        if values.get(other) is not None and is_met(need, values):
            flags = [flag_with_value(name, values[name]), flag_with_value(other, values[other])]
            raise error_in(f"--{name}", others=[f"--{other}"], cause="does not fit")(
                f"{flags[0]} does not work with {flags[1]}: {reason}", "leave one of them out"
            )


def check_followers(follows: Mapping[str, tuple[str, str]], values: Mapping[str, Any], own: Collection[str]) -> None:
    """Raise UserError if the user's `own` command or file sets an option to another value than the one it follows."""
    for name, (other, need) in follows.items():
        value, followed = values.get(name), values.get(other)
        if name in own and followed is not None and value != followed and is_met(need, values):
            raise error_in(f"--{name}", others=[f"--{other}"], cause="does not fit")(
                f"--{name} is {value}, but takes the value of --{other}, {followed}", f"leave out --{name}"
            )


def flag_with_value(name: str, value: Any) -> str:
    """Format an option as typed; the values of a list are omitted."""
    return f"--{name}" if value is True or isinstance(value, list) else f"--{name} {value}"
