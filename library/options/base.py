"""Declaration of command-line options: a dataclass field holds flag, type, default and help of an option."""

import argparse
from collections.abc import Mapping
from dataclasses import Field, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from library.options.declared import METADATA, Declared, declare, declared_of, list_declared
from library.options.kinds import BOOL, PATH, TEXT, Kind, number, whole

OptionsT = TypeVar("OptionsT", bound="Options")


DEFAULTS = "defaults"  # metadata key of a group's field
UNTYPED = Kind("")  # stands for the kind of the field's type


# Options that sd-scripts has keep its defaults, because command lines and configuration files rely on them
# (tests/contracts/test_flags.py).
def option(default: Any, help: str, *, kind: Kind = UNTYPED, **facts: Any) -> Any:
    """Declare a field of an Options class. The flag is the name of the field: `max_grad_norm` is --max_grad_norm.

    `kind` is that of the field's type unless it is given; `facts` are fields of `Declared`.
    """
    return declare(kind, default, help, **facts)


def redeclare(kind: type["Options"], name: str, default: Any, **facts: Any) -> Any:
    """Declare an option of another class with a different default or other facts."""
    original = list_declared(kind)[name]
    return field(default=default, metadata={METADATA: replace(original, default=default, **facts)})


def without_effect(default: Any, reason: str, help: str = "", **facts: Any) -> Any:
    """Declare an option that is accepted and ignored for `reason`, which is the help too unless `help` is given."""
    return option(default, help or f"Has no effect: {reason}.", ignored=reason, **facts)


def group(kind: type["Options"], **defaults: Any) -> Any:
    """Declare a field that holds a group of options; `defaults` replace those that its class declares."""
    return field(default_factory=partial(kind, **defaults), metadata={DEFAULTS: defaults})


def kind_of(hint: Any) -> Kind:
    """Return the kind of an option's single value by its type, for example of float for an optional list of floats."""
    # `float | None` is a types.UnionType, whose origin is not typing.Union.
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return KINDS[get_args(hint)[0] if get_origin(hint) is list else hint]


KINDS: Mapping[type, Kind] = {bool: BOOL, int: whole(), float: number(), str: TEXT, Path: PATH}


class Options:
    """Base class of the frozen dataclasses that hold options.

    Facts that apply to all options of a class are keywords of the class: `class SavingOptions(Options,
    affects_training=False)`.
    """

    _declared: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **declared: bool) -> None:
        super().__init_subclass__()
        cls._declared = {**cls._declared, **declared}

    @classmethod
    # Cached: a start asks about ten times, and reading the type hints of some forty classes takes 3 ms each time.
    @cache
    def typed_fields(cls) -> tuple[tuple[Field[Any], Any], ...]:
        """Return each field of the class, option or group, with its type hint."""
        hints = get_type_hints(cls)
        return tuple((f, hints[f.name]) for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    @cache
    def declarations(cls) -> Mapping[str, Declared]:
        """Return the declarations of every option of this class and its groups by name, in order of declaration."""
        by_name: dict[str, Declared] = {}
        for f, hint in cls.typed_fields():
            if is_group(hint):
                own = f.metadata[DEFAULTS]
                by_name |= {
                    name: replace(declared, default=own[name]) if name in own else declared
                    for name, declared in hint.declarations().items()
                }
            else:
                given: Kind = f.metadata[METADATA].kind
                kind = kind_of(hint) if given is UNTYPED else given
                by_name[f.name] = declared_of(f, kind=kind, **cls._declared)
        return by_name

    @classmethod
    def heading(cls) -> str:
        """Return the title of the options in the help: the first line of the docstring."""
        return (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser, declarations: Mapping[str, Declared] | None = None) -> None:
        """Declare every option of this class and its groups on `parser`, as in `declarations`, by default its own.

        Each class is an argument group, titled by its heading.
        """
        declarations = cls.declarations() if declarations is None else declarations
        section = None
        for f, kind in cls.typed_fields():
            if is_group(kind):
                kind.add_to(parser, declarations)
                continue
            section = section or parser.add_argument_group(cls.heading())
            add_option(section, declarations[f.name])

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Build the options from parsed arguments, with the values that some of them give to others."""
        values = {
            f.name: kind.from_args(args) if is_group(kind) else getattr(args, f.name) for f, kind in cls.typed_fields()
        }
        options = cls(**values)
        implied = options.implied()
        return options.with_values(implied) if implied else options

    def implied(self) -> Mapping[str, Any]:
        """Return values that these options give to others, by name, as those in another program's words do."""
        return {}

    def flat(self) -> dict[str, Any]:
        """Return the values of all options by name, including those of groups."""
        values: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            values.update(value.flat() if isinstance(value, Options) else {f.name: value})
        return values

    def with_values(self: OptionsT, values: Mapping[str, Any]) -> OptionsT:
        """Return a copy with some values replaced, by name; unknown names are ignored."""
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Options):
                changed[f.name] = value.with_values(values)
            elif f.name in values:
                changed[f.name] = values[f.name]
        return replace(self, **changed)  # type: ignore[type-var]

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the defaults of all options by name, including those of groups."""
        return {name: declared.default for name, declared in cls.declarations().items()}


def add_option(section: argparse._ArgumentGroup, declared: Declared) -> None:
    """Add an option to a group of a parser."""
    if declared.kind is BOOL:
        section.add_argument(f"--{declared.name}", action="store_true", help=declared.help)
        return
    given = {name: getattr(declared, name) for name in ("choices", "nargs", "const", "metavar")}
    keywords: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    section.add_argument(
        f"--{declared.name}", default=declared.default, type=declared.kind.parse, help=declared.help, **keywords
    )


def is_group(hint: Any) -> bool:
    """Return True if a field with this type hint holds a group of options."""
    return isinstance(hint, type) and issubclass(hint, Options)
