"""Validates event lines and reports from files against the types declared in events.py."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from library.training.reporting.events import Event, Step

LARGEST = 2**63  # of a number; file sizes fit


def check_line(line: Any) -> dict[str, Any]:
    """Return a line of `log_events` after checking its fields' types; events of later versions pass.

    Raises ValueError naming the field that does not fit.
    """
    # Unchecked, one in forty random changes of events and reports ended the tools that read them in a traceback.
    check_value(line, dict, "it")
    for name, annotation in (("time", float), ("event", str)):
        check_value(MISSING if line.get(name) is None else line[name], annotation, name)
    kind = {subclass.event: subclass for subclass in Event.__subclasses__()}.get(line["event"])
    for name, (annotation, is_required) in fields_of(kind).items() if kind else ():
        if name in line or is_required:
            check_value(line.get(name, MISSING), annotation, name)
    if kind is Step and line["step"] < 1:
        raise ValueError(f"step is {line['step']}")
    return dict(line)


def check_value(value: Any, expected: Any, name: str) -> None:
    """Raise ValueError naming `name` if a JSON value does not have the annotated type."""
    if not fits(value, expected):
        raise ValueError(f"{name} is {'missing' if value is MISSING else repr(str(value)[:60])}")


def fits(value: Any, expected: Any) -> bool:
    """Return True if a JSON value has the annotated type. bool is not a number, and numbers are finite.

    Non-finite numbers are null in JSON, so null is accepted as float. Additional keys of tables are accepted.
    """
    origin, parts = get_origin(expected) or expected, get_args(expected)
    if expected is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if is_typeddict(origin) or is_dataclass(origin):
        return isinstance(value, dict) and all(
            fits(value[name], annotation) if name in value else not is_required
            for name, (annotation, is_required) in fields_of(origin).items()
        )
    if parts and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(fits(item, parts[1]) for item in value.values())
    if parts and issubclass(origin, Sequence):
        return isinstance(value, list) and fit_all(value, parts if origin is tuple else parts * len(value))
    return is_plain(value, origin)


def fit_all(values: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(values) == len(expected) and all(map(fits, values, expected))


def is_plain(value: Any, kind: type) -> bool:
    """Return True if a value that is no table or list has the type."""
    if value is None or isinstance(value, bool):
        return kind in ((float, types.NoneType) if value is None else (bool,))
    if isinstance(value, (int, float)) and not -LARGEST <= value <= LARGEST:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def fields_of(table: Any) -> dict[str, tuple[Any, bool]]:
    """Return (type, whether it is required) of each field of a dataclass or TypedDict."""
    hints = get_type_hints(table)
    if is_dataclass(table):
        return {f.name: (hints[f.name], f.default is MISSING) for f in fields(table)}
    return {name: (hint, True) for name, hint in hints.items()}
