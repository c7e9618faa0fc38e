"""The JSON Schemas of the lines of --log_events and of tools/capabilities.py --json, from their dataclasses.

    python -m tests.schemas     # writes docs/events.schema.json and docs/capabilities.schema.json

Descriptions are the docstrings of the classes and the comments behind their fields.
"""

import inspect
import json
import re
import types
from collections import abc
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from library.base.error_lines import ErrorFields
from library.training.reporting.events import VERSION, Event
from tests.running import ROOT
from tools.capabilities import Capabilities

DIALECT = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
EVENTS = Event.__subclasses__()  # in definition order
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": ["number", "null"]},  # null stands for NaN and infinity
    Any: {},
}


def describe(hint: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type; what it refers to is added to `parts`."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return {**describe(args[0], parts), **args[1]}
    if kind is None and hint in PLAIN:
        return PLAIN[hint]
    if kind is Literal:
        return {"enum": list(args)}
    if kind in (Union, types.UnionType):
        found = [describe(arg, parts) for arg in args if arg is not type(None)]
        return found[0] if found == [PLAIN[float]] else {"anyOf": [*found, {"type": "null"}]}
    if kind is tuple:
        return {"type": "array", "prefixItems": [describe(arg, parts) for arg in args], "items": False}
    if kind is abc.Sequence:
        return {"type": "array", "items": describe(args[0], parts)}
    if kind is abc.Mapping:
        return {"type": "object", "additionalProperties": describe(args[1], parts)}
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", hint.__name__).lower()
    if name not in parts:
        parts[name] = {}  # before its own parts
        parts[name] = describe_class(hint, parts)
    return {"$ref": f"#/$defs/{name}"}


def describe_class(kind: type, parts: dict[str, Any]) -> dict[str, Any]:
    hints = {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name != "event"}
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base.__module__ == kind.__module__)
    comments = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", source))
    properties = {
        name: {**({"description": to_json_words(comments[name])} if name in comments else {}), **describe(hint, parts)}
        for name, hint in hints.items()
    }
    if issubclass(kind, Event):
        properties = {"v": True, "event": True, "time": True} | properties
    return {
        "description": to_json_words(" ".join((kind.__doc__ or "").split())),
        "type": "object", "required": list(hints), "properties": properties,
        **({} if kind.__module__ == Capabilities.__module__ else {"additionalProperties": False}),
    }  # fmt: skip


def to_json_words(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text).replace("`", "")


def make_capabilities() -> dict[str, Any]:
    parts = dict[str, Any]()
    return {**DIALECT, "title": "What this suite can do", **describe_class(Capabilities, parts), "$defs": parts}


def make_events() -> dict[str, Any]:
    parts = dict[str, Any]()
    events = {kind.event: describe_class(kind, parts) for kind in EVENTS}
    describe(ErrorFields, parts)
    return {
        **DIALECT,
        "title": "A line of --log_events",
        "description": "The events of a training run, one JSON object per line. docs/events.md explains them.",
        "type": "object",
        "required": ["v", "event", "time"],
        "properties": {
            "v": {"const": VERSION, "description": "It rises when a field is removed or changes its meaning."},
            "event": {"enum": list(events)},
            "time": {"type": "number", "description": "Seconds since 1970."},
        },
        "allOf": [
            {"if": {"properties": {"event": {"const": name}}}, "then": {"$ref": f"#/$defs/{name}"}} for name in events
        ],
        "$defs": {**events, **parts},
    }


def to_text(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each part that fits into one."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent + flat) < 110:
        return flat
    is_object, inner = isinstance(value, dict), f"{indent}  "
    named = value.items() if is_object else (("", part) for part in value)
    parts = [(f"{json.dumps(key)}: " if is_object else "") + to_text(part, inner) for key, part in named]
    first, last = "{}" if is_object else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


PAGES = {ROOT / "docs/events.schema.json": make_events, ROOT / "docs/capabilities.schema.json": make_capabilities}

if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(to_text(make()) + "\n", encoding="utf-8", newline="\n")
