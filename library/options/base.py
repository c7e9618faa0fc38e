"""Declare a command-line option once: its flag, its type, its default and its help are one dataclass field."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

OptionsT = TypeVar("OptionsT", bound="Options")


RULE, USUAL, OWN = "rule", "usual", "own"  # keys of a field's metadata that argparse does not get


@dataclass(frozen=True)
class Rule:
    """What an option needs to mean something; `library.options.rules` holds the values to it."""

    at_least: float | None = None
    at_most: float | None = None
    is_share: bool = False
    needs: tuple[str, ...] = ()
    unless: str | None = None
    ignored: str | None = None


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    is_share: bool = False,
    needs: str | tuple[str, ...] = (),
    unless: str | None = None,
    ignored: str | None = None,
    usual: bool = False,
    own: bool = False,
    **argparse_kwargs: Any,
) -> Any:
    """A field of an Options class. The flag is the field's name: `max_grad_norm` is --max_grad_norm.

    A value, or each value of a list, below `at_least` or above `at_most` is refused; a share lies in 0..1. The option
    has no effect unless one of those in `needs` asks for something ("enable_bucket") or is one of some values
    ("loss_type=huber|smooth_l1"), nor where the one in `unless` is given; one that is `ignored` never has, for the
    reason named. --help shows the `usual` ones, --help_all all. An abbreviation never means one of our `own` options,
    which sd-scripts 0.10 does not have, where it can mean another. Other keywords are argparse's.
    """
    rule = Rule(at_least, at_most, is_share, (needs,) if isinstance(needs, str) else needs, unless, ignored)
    return field(default=default, metadata={"help": help, RULE: rule, USUAL: usual, OWN: own, **argparse_kwargs})


def redeclared(kind: type["Options"], name: str, default: Any, **argparse_kwargs: Any) -> Any:
    """The option `name` of another class with a default, or choices, of its own."""
    (original,) = (f for f in fields(kind) if f.name == name)  # type: ignore[arg-type]
    return field(default=default, metadata={**original.metadata, **argparse_kwargs})


def group(kind: type["Options"]) -> Any:
    """A field that holds a whole group of options."""
    return field(default_factory=kind)


def int_or_float(text: str) -> int | float:
    """The number in `text`: steps when it is a whole number, a share of the run when it lies below 1 or ends in `%`.

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
    """The type of one value of an option: `list[float] | None` gives float."""
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return get_args(hint)[0] if get_origin(hint) is list else hint


class Options:
    """Base of the frozen dataclasses that hold what the user asked for."""

    @classmethod
    def leaves(cls) -> Iterator[tuple[Field[Any], Any]]:
        """Every option below this class with its type hint, groups opened, in the order of declaration."""
        hints = get_type_hints(cls)
        for f in fields(cls):  # type: ignore[arg-type]
            kind = hints[f.name]
            if isinstance(kind, type) and issubclass(kind, Options):
                yield from kind.leaves()
            else:
                yield f, kind

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Declare every option of this class and of its groups on `parser`.

        Each class is an argument group, headed by the first sentence of its docstring.
        """
        hints = get_type_hints(cls)
        heading = (cls.__doc__ or cls.__name__).partition("\n")[0].rstrip(".")
        section = None
        for f in fields(cls):  # type: ignore[arg-type]
            kind = hints[f.name]
            if isinstance(kind, type) and issubclass(kind, Options):
                kind.add_to(parser)
                continue
            section = section or parser.add_argument_group(heading)
            assert f.default is not MISSING, f.name
            keywords = {key: value for key, value in f.metadata.items() if key not in (RULE, USUAL, OWN)}
            if kind is bool:
                section.add_argument(f"--{f.name}", action="store_true", **keywords)
            else:
                section.add_argument(f"--{f.name}", default=f.default, **{"type": scalar_type(kind), **keywords})

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values."""
        hints = get_type_hints(cls)
        values = {}
        for f in fields(cls):  # type: ignore[arg-type]
            kind = hints[f.name]
            is_group = isinstance(kind, type) and issubclass(kind, Options)
            values[f.name] = kind.from_args(args) if is_group else getattr(args, f.name)
        return cls(**values)

    def flat(self) -> dict[str, Any]:
        """Every option below this group by name, groups opened."""
        values: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            values.update(value.flat() if isinstance(value, Options) else {f.name: value})
        return values

    def with_values(self: OptionsT, values: Mapping[str, Any]) -> OptionsT:
        """The same with other values for some options, by name; names that this class does not have are left out."""
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
        """What every option below this class is when nobody sets it."""
        return {f.name: f.default for f, _ in cls.leaves()}


def changes(before: Options, after: Options) -> dict[str, Any]:
    """The options that have another value afterwards, by name."""
    values = before.flat()
    return {name: value for name, value in after.flat().items() if value != values[name]}
