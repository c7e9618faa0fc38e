"""Declare a command-line option once: its flag, its type, its default and its help are one dataclass field."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

OptionsT = TypeVar("OptionsT", bound="Options")


FACTS = "facts"  # the key of a field's metadata that argparse does not get

OnResume = Literal["new rate", "new length", "kept by the optimizer"]


@dataclass(frozen=True)
class Facts:
    """The facts that the declaration of an option carries."""

    # Range of a value, or of each value of a list; a share is 0 to 1.
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    is_share: bool = False
    # Values besides the choices pass, and are checked where they are used.
    takes_other_values: bool = False

    # The option has no effect unless one of these is set ("enable_bucket") or has one of some values
    # ("loss_type=huber|smooth_l1"); with `requires` the run is refused instead.
    needs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    # Options, written as in `needs`, with which the run is refused, each with the reason.
    excludes: Mapping[str, str] = field(default_factory=dict)
    # The option has no effect where this one is set.
    unless: str | None = None
    # Why the option never has an effect.
    ignored: str | None = None
    # Why a run with the option is refused; of one that `needs` another, where both are given.
    unsupported: str | None = None

    # Without images (LECO) the option has no effect, for this reason where it is not plain, or is refused for this one.
    needs_images: bool = False
    ignored_by_leco: str | None = None
    refused_by_leco: str | None = None

    # Another value may give other weights.
    affects_training: bool = True
    # A training state holds what the option stands for (the seed), or compares that itself (the images).
    kept_in_state: bool = False
    # What another value means for a resumed run; None means that it differs from an uninterrupted one.
    on_resume: OnResume | None = None

    # How file names of a sweep abbreviate the option, "" where the value says it all; None means that adapters of one
    # run cannot differ in it.
    sweep_name: str | None = None
    # 0 means the same as leaving the option out.
    zero_is_unset: bool = False
    # The value is a file that the run writes.
    names_output: bool = False
    # A password, which no file and no tracker may hold.
    secret: bool = False
    # Trackers may show the value.
    logged: bool = True
    # The short help shows the option.
    usual: bool = False
    # sd-scripts 0.10 does not have the option, so an abbreviation that fits one of its options means that one.
    own: bool = False

    @property
    def may_change_on_resume(self) -> bool:
        """Return True if a resumed run goes on as the uninterrupted one would have, whatever the option is."""
        return self.kept_in_state or self.ignored is not None or not self.affects_training


def option(default: Any, help: str, **keywords: Any) -> Any:
    """Declare a field of an Options class. The flag is the field's name: `max_grad_norm` is --max_grad_norm.

    `keywords` are those of `Facts`, of which `needs` and `requires` may be a single text, and those of
    `ArgumentParser.add_argument`.
    """
    given = {f.name: keywords.pop(f.name) for f in fields(Facts) if f.name in keywords}
    for name in ("needs", "requires"):
        if isinstance(given.get(name), str):
            given[name] = (given[name],)
    return field(default=default, metadata={"help": help, FACTS: Facts(**given), **keywords})


def redeclared(kind: type["Options"], name: str, default: Any, **argparse_kwargs: Any) -> Any:
    """Declare the option `name` of another class with a default, or choices, of its own."""
    (original,) = (f for f in fields(kind) if f.name == name)  # type: ignore[arg-type]
    return field(default=default, metadata={**original.metadata, **argparse_kwargs})


def group(kind: type["Options"]) -> Any:
    """Declare a field that holds a whole group of options."""
    return field(default_factory=kind)


def int_or_float(text: str) -> int | float:
    """Read a number: steps when it is a whole number, a share of the run when it lies below 1 or ends in `%`.

    0 is a share, as sd-scripts has it, and so are negative numbers, which the range of the option refuses.
    Raises argparse.ArgumentTypeError for anything else: for 1.0 and above with a point, which may be meant either way.
    """
    try:
        if text.strip().isdigit() and int(text) > 0:
            return int(text)
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not share < 1:  # NaN is not either
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of steps or a share of the run below 1.0")
    return share


def scalar_type(hint: Any) -> Any:
    """Return the type of one value of an option: `list[float] | None` gives float."""
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


class Options:
    """Base of the frozen dataclasses that hold what the user asked for.

    A fact that holds for all options of a class, such as affects_training, needs_images and own, is a keyword of the
    class: `class SavingOptions(Options, affects_training=False)`.
    """

    _facts: ClassVar[Mapping[str, bool]] = {}

    def __init_subclass__(cls, **facts: bool) -> None:
        super().__init_subclass__()
        cls._facts = {**cls._facts, **facts}

    @classmethod
    def leaves(cls) -> Iterator[tuple[Field[Any], Any]]:
        """Yield every option below this class with its type hint, groups opened, in the order of declaration."""
        for f, kind in typed_fields(cls):
            yield from kind.leaves() if is_group(kind) else ((f, kind),)

    @classmethod
    @cache
    def facts(cls) -> Mapping[str, Facts]:
        """Return the facts of every option below this class, by name, in the order of declaration."""
        found: dict[str, Facts] = {}
        for f, kind in typed_fields(cls):
            found |= kind.facts() if is_group(kind) else {f.name: replace(f.metadata[FACTS], **cls._facts)}
        return found

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Declare every option of this class and of its groups on `parser`.

        Each class is an argument group, headed by the first sentence of its docstring.
        """
        heading = (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")
        section = None
        for f, kind in typed_fields(cls):
            if is_group(kind):
                kind.add_to(parser)
                continue
            section = section or parser.add_argument_group(heading)
            assert f.default is not MISSING, f.name
            keywords = {key: value for key, value in f.metadata.items() if key != FACTS}
            if kind is bool:
                section.add_argument(f"--{f.name}", action="store_true", **keywords)
            else:
                section.add_argument(f"--{f.name}", default=f.default, **{"type": scalar_type(kind), **keywords})

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values."""
        values = {
            f.name: kind.from_args(args) if is_group(kind) else getattr(args, f.name) for f, kind in typed_fields(cls)
        }
        return cls(**values)

    def flat(self) -> dict[str, Any]:
        """Return the value of every option below this group by name, groups opened."""
        values: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            values.update(value.flat() if isinstance(value, Options) else {f.name: value})
        return values

    def with_values(self: OptionsT, values: Mapping[str, Any]) -> OptionsT:
        """Return a copy with other values for some options, by name; names of other classes are ignored."""
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
        """Return the default of every option below this class, by name."""
        return {f.name: f.default for f, _ in cls.leaves()}


def typed_fields(kind: type[Options]) -> Iterator[tuple[Field[Any], Any]]:
    """Yield the fields of a class, options and groups alike, with their type hints."""
    hints = get_type_hints(kind)
    for f in fields(kind):  # type: ignore[arg-type]
        yield f, hints[f.name]


def is_group(hint: Any) -> bool:
    """Return True if a field with this type hint holds a group of options."""
    return isinstance(hint, type) and issubclass(hint, Options)
