"""Declaration of command-line options: a dataclass field holds flag, type, default and help of an option."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

OptionsT = TypeVar("OptionsT", bound="Options")


DECLARATION = "declaration"  # metadata key of a field that is not passed to argparse

PathKind = Literal["file", "folder", "file or folder", "part", "model", "new file", "new folder"]
"""A path of an option: a part of the base model is a file or a folder, a model may also be a name on the hub; a new
one is created if missing."""
OnResume = Literal["new rate", "new length", "kept by the optimizer"]


@dataclass(frozen=True)
class Declaration:
    """Declaration about an option that argparse has no place for."""

    # Valid range of a value, or of each value of a list; a share is between 0 and 1.
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    is_share: bool = False
    # Values outside `choices` are accepted by the parser and checked where they are used.
    takes_other_values: bool = False

    # The option has no effect unless one of these options is set ("enable_bucket") or has one of the given values
    # ("loss_type=huber|smooth_l1"). `requires` refuses the run instead.
    needs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    # Options that exclude this one, written as in `needs`, each with the reason.
    excludes: Mapping[str, str] = field(default_factory=dict)
    # An option that disables this one when it is set.
    unless: str | None = None
    # Reason why the option never has an effect.
    ignored: str | None = None
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
    # The option does not exist in sd-scripts 0.10, so an ambiguous abbreviation resolves to one of its options instead.
    own: bool = False

    @property
    def may_change_on_resume(self) -> bool:
        """Return True if a new value on resume does not change the result."""
        return self.kept_in_state or self.ignored is not None or not self.affects_training


# Options that sd-scripts has keep its defaults, because command lines and configuration files rely on them
# (tests/contracts/test_flags.py).
def option(default: Any, help: str, **keywords: Any) -> Any:
    """Declare a field of an Options class. The flag is the name of the field: `max_grad_norm` is --max_grad_norm.

    `keywords` are fields of `Declaration` and arguments of `ArgumentParser.add_argument`. `needs` and `requires` may be
    single strings.
    """
    declared = {f.name: keywords.pop(f.name) for f in fields(Declaration) if f.name in keywords}
    for name in ("needs", "requires"):
        if isinstance(declared.get(name), str):
            declared[name] = (declared[name],)
    return field(default=default, metadata={"help": help, DECLARATION: Declaration(**declared), **keywords})


def redeclare(kind: type["Options"], name: str, default: Any, **argparse_kwargs: Any) -> Any:
    """Declare an option of another class with a different default or different argparse arguments."""
    (original,) = (f for f in fields(kind) if f.name == name)  # type: ignore[arg-type]
    return field(default=default, metadata={**original.metadata, **argparse_kwargs})


def group(kind: type["Options"]) -> Any:
    """Declare a field that holds a group of options."""
    return field(default_factory=kind)


def int_or_float(text: str) -> int | float:
    """Parse a number of steps, or a fraction of the run if it is below 1 or ends in `%`.

    0 is a fraction, as in sd-scripts. So are negative numbers, which the option's range refuses. Raises
    argparse.ArgumentTypeError for anything else, including 1.0 and above with a decimal point, which is ambiguous.
    """
    try:
        if text.strip().isdigit() and int(text) > 0:
            return int(text)
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not share < 1:  # also True for NaN
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of steps or a share of the run below 1.0")
    return share


def scalar_type(hint: Any) -> Any:
    """Return the type of an option's single value, for example float for an optional list of floats."""
    # `float | None` is a types.UnionType, whose origin is not typing.Union.
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


class Options:
    """Base class of the frozen dataclasses that hold options.

    Declaration that apply to all options of a class are keywords of the class: `class SavingOptions(Options,
    affects_training=False)`.
    """

    _declared: ClassVar[Mapping[str, bool]] = {}

    def __init_subclass__(cls, **declared: bool) -> None:
        super().__init_subclass__()
        cls._declared = {**cls._declared, **declared}

    @classmethod
    def leaves(cls) -> Iterator[tuple[Field[Any], Any]]:
        """Yield each option of this class and its groups as (field, type hint), in order of declaration."""
        for f, kind in typed_fields(cls):
            yield from kind.leaves() if is_group(kind) else ((f, kind),)

    @classmethod
    # Cached: a start asks about ten times, and reading the type hints of some forty classes takes 3 ms each time.
    @cache
    def declarations(cls) -> Mapping[str, Declaration]:
        """Return the declarations of every option of this class and its groups by name, in order of declaration."""
        by_name: dict[str, Declaration] = {}
        for f, kind in typed_fields(cls):
            by_name |= (
                kind.declarations() if is_group(kind) else {f.name: replace(f.metadata[DECLARATION], **cls._declared)}
            )
        return by_name

    @classmethod
    def heading(cls) -> str:
        """Return the title of the options in the help: the first line of the docstring."""
        return (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Declare every option of this class and its groups on `parser`.

        Each class is an argument group, titled by its heading.
        """
        section = None
        for f, kind in typed_fields(cls):
            if is_group(kind):
                kind.add_to(parser)
                continue
            section = section or parser.add_argument_group(cls.heading())
            assert f.default is not MISSING, f.name
            keywords = {key: value for key, value in f.metadata.items() if key != DECLARATION}
            if kind is bool:
                section.add_argument(f"--{f.name}", action="store_true", **keywords)
            else:
                section.add_argument(f"--{f.name}", default=f.default, **{"type": scalar_type(kind), **keywords})

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        values = {
            f.name: kind.from_args(args) if is_group(kind) else getattr(args, f.name) for f, kind in typed_fields(cls)
        }
        return cls(**values)

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
        return {f.name: f.default for f, _ in cls.leaves()}


def typed_fields(kind: type[Options]) -> Iterator[tuple[Field[Any], Any]]:
    """Yield each field of a class, option or group, with its type hint."""
    hints = get_type_hints(kind)
    for f in fields(kind):  # type: ignore[arg-type]
        yield f, hints[f.name]


def is_group(hint: Any) -> bool:
    """Return True if a field with this type hint holds a group of options."""
    return isinstance(hint, type) and issubclass(hint, Options)
