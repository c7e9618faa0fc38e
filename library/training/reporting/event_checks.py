"""Validates event lines and reports from files against the types declared in events.py."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from library.training.reporting.events import Event, Step

LARGEST = 2**63  # of a number; file sizes fit


def check_line(line: Any) -> dict[str, Any]:
    """Return a line of `log_events` after checking its fields' types; events of later versions pass.

    Raises ValueError naming the field that does not fit.
    """
    # Unchecked, one in forty random changes of events and reports ended the tools that read them in a traceback.
    if not isinstance(line, dict):
        raise ValueError(f"it is a {type(line).__name__}, not a table")
    check_is(line.get("time"), (int, float), "time")
    check_value(line.get("event"), str, "event")
    kind = {subclass.event: subclass for subclass in Event.__subclasses__()}.get(line["event"])
    if kind is not None:
        check_value(line, kind, line["event"])
    if line["event"] == Step.event and line["step"] < 1:
        raise unfit(line["step"], "step.step")
    return line


def check_value(value: Any, expected: Any, name: str) -> None:
    """Raise ValueError naming `name` if a JSON value does not have the annotated type.

    Non-finite numbers are null in JSON, so null is accepted as float. Additional keys of tables are accepted.
    """
    if expected is Any:
        return
    origin, parts = get_origin(expected) or expected, get_args(expected)
    if origin in (Union, types.UnionType):
        if not any(fits(value, part, name) for part in parts):
            raise unfit(value, name)
    elif origin is Literal:
        if value not in parts:
            raise unfit(value, name)
    elif is_typeddict(origin) or is_dataclass(origin):
        check_table(value, origin, name)
    elif issubclass(origin, Mapping):
        check_is(value, dict, name)
        for key, item in value.items():
            check_value(item, parts[1], f"{name}.{key}")
    elif issubclass(origin, Sequence) and origin is not str:
        check_is(value, list, name)
        for number, item in enumerate(value):
            check_value(item, parts[0], f"{name}[{number}]")
    elif origin is float:
        if value is not None:
            check_is(value, (int, float), name)
    else:
        check_is(value, origin, name)


def check_table(value: Any, expected: Any, name: str) -> None:
    """Raise ValueError if a table lacks a field or a field has another type than the dataclass or TypedDict
    declares."""
    check_is(value, dict, name)
    declared: dict[str, Field[Any]] = {f.name: f for f in fields(expected)} if is_dataclass(expected) else {}
    for key, annotation in get_type_hints(expected).items():
        if is_dataclass(expected) and key not in declared:  # a class variable
            continue
        if key in value:
            check_value(value[key], annotation, f"{name}.{key}")
        elif key not in declared or declared[key].default is MISSING:
            raise ValueError(f"{name} has no {key}")


def check_is(value: Any, expected: type | tuple[type, ...], name: str) -> None:
    """Raise ValueError for another type, and for numbers that are not finite or too large; bool is not a number."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise unfit(value, name)
    if isinstance(value, (int, float)) and not -LARGEST <= value <= LARGEST:
        raise unfit(value, name)


def fits(value: Any, expected: Any, name: str) -> bool:
    """Return True if a value has the annotated type."""
    try:
        check_value(value, expected, name)
    except ValueError:
        return False
    return True


def unfit(value: Any, name: str) -> ValueError:
    return ValueError(f"{name} is {str(value)[:60]!r}")
