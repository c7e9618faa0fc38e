"""The declaration of a setting that a user can write, as a field of a frozen dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from library.options.kinds import Kind, Range

METADATA = "declared"  # metadata key of a field


@dataclass(frozen=True)
class Declared:
    """A setting that a user can write: its name, the values that it takes, and its meaning.

    The last groups of fields are each for one place in which settings stand.
    """

    kind: Kind
    default: Any
    help: str
    name: str = ""  # that of the field

    # A setting of a preview prompt: the option in a line of text, without "--".
    letters: str = ""

    @property
    def range(self) -> Range:
        return self.kind.range


def declare(kind: Kind, default: Any, help: str, **facts: Any) -> Any:
    """Declare a field that is a setting of its name; `facts` are fields of `Declared`."""
    declared = Declared(kind, default, help, **facts)
    # dataclasses refuse a dict as a default.
    is_plain = type(default).__hash__ is not None
    source: dict[str, Any] = {"default": default} if is_plain else {"default_factory": _returning(default)}
    return field(**source, metadata={METADATA: declared})


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def list_declared(group: type[Any]) -> dict[str, Declared]:
    """Return the settings that a dataclass declares, by name, in order of declaration."""
    return {f.name: replace(f.metadata[METADATA], name=f.name) for f in fields(group) if METADATA in f.metadata}
