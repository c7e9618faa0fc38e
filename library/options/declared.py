"""The declaration of a setting that a user can write, as a field of a frozen dataclass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from library.options.kinds import Kind, Range

METADATA = "declared"  # metadata key of a field


@dataclass(frozen=True)
class Needs:
    """Other settings that one needs to have an effect: of each group at least one."""

    groups: tuple[tuple[str, ...], ...] = ()
    words: str = ""  # names them to users


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

    @property
    def range(self) -> Range:
        return self.kind.range

    @property
    def flag(self) -> str | None:
        """The name of the option that sets the default of a key."""
        return self.default_option or (None if self.default_option is None else self.name)


def declare(kind: Kind, default: Any, help: str, **facts: Any) -> Any:
    """Declare a field that is a setting of its name; `facts` are fields of `Declared`. `needs` may be one name."""
    if isinstance(name := facts.get("needs"), str):
        facts["needs"] = Needs(((name,),), name)
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


def list_aliases(declared: Mapping[str, Declared]) -> dict[str, str]:
    """Return the name of the setting that each alias stands for."""
    return {alias: name for name, setting in declared.items() for alias in setting.aliases}
