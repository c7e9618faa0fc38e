"""Declaration of the keys of a dataset file: a dataclass field holds type, default, levels and option of a key."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from library.options.dataset import INTERPOLATIONS
from library.options.kinds import Kind, choice, number, size, whole

Style = Literal["dreambooth", "metadata", "masked"]
Level = Literal["general", "dataset", "subset"]

STYLES: tuple[Style, ...] = ("dreambooth", "metadata", "masked")
GD: tuple[Level, ...] = ("general", "dataset")
GDS: tuple[Level, ...] = ("general", "dataset", "subset")
ONLY_S: tuple[Level, ...] = ("subset",)

LARGEST = 2**31 - 1
LARGEST_SIDE = 2**14  # images of a larger side exhaust main memory before any model sees them


def _whole(low: int | None) -> Kind:
    kind = whole(low, LARGEST)
    # As in sd-scripts, true and false count as 1 and 0.
    return Kind(kind.name, lambda v: kind.fits(int(v) if isinstance(v, bool) else v), int)


INT, COUNT, BATCH_SIZE = _whole(None), _whole(0), _whole(1)
NUMBER, SHARE = number(0, LARGEST), number(0, 1)
SIZE, IMAGE_SIZE = (size(low, high, "[width, height]") for low, high in ((0, LARGEST), (1, LARGEST_SIDE)))
FILTER = choice(*INTERPOLATIONS, "box")
SEPARATOR = Kind("a text such as ','", lambda v: isinstance(v, str) and v != "")
EXTENSION = Kind("text in quotes", lambda v: isinstance(v, str), lambda v: v if v.startswith(".") else f".{v}")
FACE_RANGE = Kind(
    "two positive numbers, the smaller first, such as [1.0, 3.0]",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(NUMBER.fits, v)) and 0 < v[0] <= v[1],
    lambda v: (float(v[0]), float(v[1])),
)


@dataclass(frozen=True)
class Key:
    """A key of the dataset file."""

    name: str
    kind: Kind
    default: Any
    levels: tuple[Level, ...]
    styles: tuple[Style, ...] = STYLES
    flag: str | None = None  # the option that sets the default

    def is_allowed_at(self, level: Level, style: Style | None) -> bool:
        """Return True if the key is allowed at this level for this style; None means any style, as in [general]."""
        return level in self.levels and (style is None or style in self.styles)


def key(kind: Kind, default: Any, levels: tuple[Level, ...] = GDS, styles: tuple[Style, ...] = STYLES) -> Any:
    """Declare a field that is a key of its name."""
    return field(default_factory=lambda: default, metadata={"key": Key("", kind, default, levels, styles)})


def key_of_option(
    kind: Kind, default: Any, levels: tuple[Level, ...] = GDS, styles: tuple[Style, ...] = STYLES, flag: str = ""
) -> Any:
    """Declare a field that is a key of its name, and whose default an option sets: `flag`, else that of its name."""
    return field(default_factory=lambda: default, metadata={"key": Key("", kind, default, levels, styles, flag)})


def keys_of(kind: type) -> Iterator[Key]:
    for f in fields(kind):
        if declared := f.metadata.get("key"):
            yield replace(declared, name=f.name, flag=f.name if declared.flag == "" else declared.flag)
