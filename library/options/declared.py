"""The declaration of a setting that a user can write, as a field of a frozen dataclass.

Its help is the docstring below the field, or an argument where it is composed of other texts.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from library.options.kinds import Kind, Range

METADATA = "declared"  # metadata key of a field
LINES = re.compile(r'^(?:class (\w+)|def )|^    (\w+): |^    """(.*?)"""$', re.MULTILINE | re.DOTALL)

PathKind = Literal["file", "folder", "file or folder", "part", "model", "new file", "new folder"]
"""A path of an option: a part of the base model is a file or a folder, a model may also be a name on the hub; a new
one is created if missing."""
OnResume = Literal["new rate", "new length", "kept by the optimizer"]


@dataclass(frozen=True)
class Needs:
    """Other settings that one needs to have an effect: of each group at least one is set ("enable_bucket"), or has one
    of the given values ("loss_type=huber|smooth_l1")."""

    groups: tuple[tuple[str, ...], ...] = ()
    words: str = ""  # names them to users

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


@dataclass(frozen=True)
class Declared:
    """A setting that a user can write: its name, the values that it takes, and its meaning.

    The last groups of fields are each for one place in which settings stand.
    """

    kind: Kind
    default: Any
    help: str
    name: str = ""  # that of the field
    aliases: tuple[str, ...] = ()  # other spellings
    needs: Needs = Needs()
    # Settings that exclude this one, written as in `needs`, each with the reason.
    excludes: Mapping[str, str] = field(default_factory=dict)
    ignored: str | None = None  # reason why it never has an effect

    # A key of a dataset file: the tables and styles of subsets that may have it, and the option that sets its default,
    # "" for that of its name.
    levels: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    default_option: str | None = None

    # A network argument: `dim_from_weights` takes it from the file.
    is_fixed_by_file: bool = False

    # A setting of a preview prompt: the option in a line of text, without "--".
    letters: str = ""

    # An option. `choices` are those that argparse checks, `nargs`, `const` and `metavar` as there.
    choices: Sequence[Any] | None = None
    nargs: str | None = None
    const: Any = None
    metavar: str | None = None
    # Values outside `choices` are accepted by the parser and checked where they are used.
    takes_other_values: bool = False

    # Options of which one must be set, written as in `needs`: the run is refused without them.
    requires: tuple[str, ...] = ()
    # An option that disables this one when it is set.
    unless: str | None = None
    # Reason why a run with the option is refused. If the option also has `needs`, only runs that meet them are refused.
    unsupported: str | None = None

    # Reason why the option is ignored or refused without images (LECO).
    needs_images: bool = False
    ignored_by_leco: str | None = None
    refused_by_leco: str | None = None

    # False if the option cannot change the trained weights.
    affects_training: bool = True
    # The training state contains the values that the option determines (seed), or compares them itself (images).
    kept_in_state: bool = False
    # The effect of a new value on a resumed run; None if the run then differs from an uninterrupted one.
    on_resume: OnResume | None = None

    # What the path is that the value is; None for other values.
    path: PathKind | None = None
    # Abbreviation of the option in names of files, "" if the value suffices; None is the name without its underscores.
    short_name: str | None = None
    # 0 means unset.
    zero_is_unset: bool = False
    # A password, which must not appear in any file or tracker.
    secret: bool = False
    # Trackers may show the value (--log_config).
    logged: bool = True
    # Listed in the short help.
    usual: bool = False
    # An option whose value this one takes, over a default and a recipe, while a setting has the given value: ("that",
    # "loss_type=l2"). Another value of the user's own is refused.
    follows: tuple[str, str] | None = None

    @property
    def range(self) -> Range:
        return self.kind.range

    @property
    def own(self) -> bool:
        """Return True for an option that no script of sd-scripts 0.10 has."""
        from library.options.other_programs import ABBREVIATED, SD_SCRIPTS, read_program  # few starts need it

        entry = read_program(SD_SCRIPTS).get(self.name)
        return entry is None or entry.since != ABBREVIATED

    @property
    def may_change_on_resume(self) -> bool:
        """Return True if a new value on resume does not change the result."""
        return self.kept_in_state or self.ignored is not None or not self.affects_training

    @property
    def flag(self) -> str | None:
        """The name of the option that sets the default of a key."""
        return self.default_option or (None if self.default_option is None else self.name)


NAMES = {"needs", "requires"}


def declare(kind: Kind, default: Any, help: str = "", **facts: Any) -> Any:
    """Declare a field that is a setting of its name; `facts` are fields of `Declared`. `needs` may be one name, or
    several of which one suffices; so may `requires`."""
    names = {key: (facts[key],) if isinstance(facts[key], str) else facts[key] for key in facts.keys() & NAMES}
    facts |= names
    if isinstance(names.get("needs"), tuple):
        facts["needs"] = Needs((names["needs"],), names["needs"][0])
    declared = Declared(kind, default, help, **facts)
    # dataclasses refuse a dict as a default.
    is_plain = type(default).__hash__ is not None
    source: dict[str, Any] = {"default": default} if is_plain else {"default_factory": _returning(default)}
    return field(**source, metadata={METADATA: declared})


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def list_declared(group: type[Any]) -> dict[str, Declared]:
    """Return the settings that a dataclass declares, by name, in order of declaration."""
    return {f.name: declared_of(f, group) for f in fields(group) if METADATA in f.metadata}


def declared_of(declaring: Field[Any], group: type, **facts: Any) -> Declared:
    """Return the setting that a field of a dataclass declares, with its name, its help and other facts."""
    declared: Declared = declaring.metadata[METADATA]
    help = declared.help or read_docs(group).get(declaring.name, "")
    return replace(declared, name=declaring.name, help=help, **facts)


@cache
def read_docs(group: type) -> Mapping[str, str]:
    """Return the docstrings below the fields of a class and of its bases, by field; Python itself keeps none."""
    docs: dict[str, str] = {}
    for kind in reversed(group.__mro__):
        docs |= read_docs_of_file(getattr(sys.modules.get(kind.__module__), "__file__", None)).get(kind.__name__, {})
    return docs


@cache
def read_docs_of_file(path: str | None) -> Mapping[str, Mapping[str, str]]:
    """Return the docstrings below fields in a Python file, by class and field; none for a module without a file."""
    docs, kind, name = dict[str, dict[str, str]](), "", ""
    for line in LINES.finditer("" if path is None else Path(path).read_text(encoding="utf-8")):
        kind = kind if line[2] or line[3] else line[1] or ""  # "" in a function
        if line[3] and name:
            docs.setdefault(kind, {})[name] = " ".join(line[3].split())
        name = line[2] or ""
    return docs


def list_aliases(declared: Mapping[str, Declared]) -> dict[str, str]:
    """Return the name of the setting that each alias stands for."""
    return {alias: name for name, setting in declared.items() for alias in setting.aliases}
