"""Declaration of the keys of a dataset file: their kinds of values, levels and options."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from library.options.dataset import INTERPOLATIONS, DatasetOptions
from library.options.declared import Declared, declare, list_declared
from library.options.kinds import Kind, choice, number, size, whole
from library.options.training.run import MAX_SEED
from library.options.training.validation import ValidationOptions

Style = Literal["dreambooth", "metadata", "masked"]
Level = Literal["general", "dataset", "subset"]

STYLES: tuple[Style, ...] = ("dreambooth", "metadata", "masked")
GD: tuple[Level, ...] = ("general", "dataset")
GDS: tuple[Level, ...] = ("general", "dataset", "subset")
ONLY_S: tuple[Level, ...] = ("subset",)

LARGEST = 2**31 - 1
LARGEST_SIDE = 2**14  # images of a larger side exhaust main memory before any model sees them


def _whole(low: int | None, high: int = LARGEST) -> Kind:
    kind = whole(low, high)
    # As in sd-scripts, true and false count as 1 and 0.
    return replace(kind, fits=lambda v: kind.fits(int(v) if isinstance(v, bool) else v))


INT, COUNT, BATCH_SIZE = _whole(None), _whole(0), _whole(1)
COUNT_FROM_1 = whole(1, LARGEST)
SEED = _whole(-MAX_SEED, MAX_SEED)
NUMBER = number(0, LARGEST)
SIZE, IMAGE_SIZE = (size(low, high, "[width, height]") for low, high in ((0, LARGEST), (1, LARGEST_SIDE)))
FILTER = choice(*INTERPOLATIONS, "box")
SEPARATOR = Kind("a text such as ','", lambda v: isinstance(v, str) and v != "")
EXTENSION = Kind("text in quotes", lambda v: isinstance(v, str), lambda v: v if v.startswith(".") else f".{v}")
FACE_RANGE = Kind(
    "two positive numbers, the smaller first, such as [1.0, 3.0]",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(NUMBER.fits, v)) and 0 < v[0] <= v[1],
    lambda v: (float(v[0]), float(v[1])),
    type="float",
    is_list=True,
)
HELP: Mapping[str, str] = {
    option.name: option.help for kind in (DatasetOptions, ValidationOptions) for option in list_declared(kind).values()
}
"""Option -> its help, which is that of the key whose default it sets."""


def key(
    kind: Kind, default: Any, help: str = "", levels: tuple[Level, ...] = GDS, styles: tuple[Style, ...] = STYLES,
    **facts: Any,
) -> Any:  # fmt: skip
    """Declare a field that is a key of its name; `facts` are fields of `Declared`."""
    return declare(kind, default, help, levels=levels, styles=styles, **facts)


def key_of_option(
    kind: Kind, default: Any, levels: tuple[Level, ...] = GDS, styles: tuple[Style, ...] = STYLES, flag: str = "",
    help: str = "",
) -> Any:  # fmt: skip
    """Declare a field that is a key of its name, and whose default an option sets: `flag`, else that of its name. The
    help is that of the option unless it is given."""
    return key(kind, default, help, levels, styles, default_option=flag)


def keys_of(kind: type) -> Iterator[Declared]:
    """Yield the keys that a dataclass declares."""
    for declared in list_declared(kind).values():
        yield declared if declared.help else replace(declared, help=HELP[str(declared.flag)])


def is_allowed_at(key: Declared, level: Level, style: Style | None) -> bool:
    """Return True if a key is allowed at this level for this style; None means any style, as in [general]."""
    return level in key.levels and (style is None or style in key.styles)
