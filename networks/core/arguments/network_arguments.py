"""Typed network arguments: `--network_args "key=value"` parsed into dataclasses.

A group is a frozen dataclass with fields declared by `argument`. Groups for all adapters are in arguments/common.py. A
core feature such as DoRA declares its group next to its implementation, an adapter kind in its own file.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from library.checkpoints.base_model_spec import ArgumentForm
from library.errors import UserError
from library.suggestions import nearest_name
from networks.core.arguments.values import parse_bool, parse_embedder_ranks, parse_rank, parse_selection

logger = logging.getLogger(__name__)

Group = TypeVar("Group")
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Requirement:
    """Condition for an argument to have an effect: one name of each tuple is given. `words` describes it to users."""

    names: tuple[tuple[str, ...], ...]
    words: str


@dataclass(frozen=True)
class Argument:
    """Declaration of one field of a group."""

    parse: Parse  # parses and range-checks the text; raises UserError naming the expected form
    help: str
    aliases: tuple[str, ...] = ()
    requires: Requirement | None = None
    is_fixed_by_file: bool = False  # `dim_from_weights` takes it from the file


def argument(
    parse: Parse,
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    requires: Requirement | None = None,
    is_fixed_by_file: bool = False,
) -> Any:
    """Declare a field of a group. A default of None means that the argument was not given."""
    return field(default=default, metadata={"argument": Argument(parse, help, aliases, requires, is_fixed_by_file)})


def list_declared(group: type[Any]) -> dict[str, Argument]:
    """Return the declared arguments of a group by name."""
    return {
        declared.name: declared.metadata["argument"] for declared in fields(group) if "argument" in declared.metadata
    }


@dataclass(frozen=True)
class NetworkArguments:
    """Network arguments of one network. A missing group has its defaults."""

    groups: Mapping[type[Any], Any] = field(default_factory=dict)
    of_model: Mapping[str, Any] = field(default_factory=dict)  # given arguments that AdapterTargets defines

    def of(self, group: type[Group]) -> Group:
        values: Group = self.groups.get(group) or group()
        return values

    def replace(self, group: type[Any], **values: Any) -> "NetworkArguments":
        """Return a copy with other values in one group."""
        return replace(self, groups={**self.groups, group: replace(self.of(group), **values)})

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, by name."""
        return {
            declared.name: getattr(values, declared.name)
            for values in self.groups.values()
            for declared in fields(values)
            if getattr(values, declared.name) != declared.default
        }


@dataclass(frozen=True)
class NetworkSettings:
    """Rank (the kind's default if not given), alpha and network arguments of a run."""

    rank: int
    alpha: float
    arguments: NetworkArguments
    is_rank_given: bool


OF_MODELS: Mapping[ArgumentForm, Parse] = {  # parsers of arguments that base models define in AdapterTargets
    "rank": parse_rank,
    "ranks": parse_embedder_ranks,
    "blocks": parse_selection,
    "flag": parse_bool,
    "word": str,
}

DROPOUTS = ("dropout", "dropout_probability", "boft_dropout")  # aliases of `network_dropout`


def read_groups(
    groups: Sequence[type[Any]],
    items: Mapping[str, Any],
    neuron_dropout: float | None = None,
    of_models: Mapping[str, ArgumentForm] = MappingProxyType({}),
    in_file: Collection[str] = (),
) -> NetworkArguments:
    """Parse the network arguments that a user gave; None means not given.

    `of_models` maps the arguments of base models to the form of their values. `dropout` (LyCORIS),
    `dropout_probability` (OFT) and `boft_dropout` (BOFT) are aliases of `network_dropout`, which is passed as
    `neuron_dropout`. `in_file` names arguments whose feature the file of the weights has. Raises UserError naming the
    argument for an unknown key, an invalid value, or two spellings with different values. Warns about arguments that
    have no effect without another one.
    """
    known: dict[str, Argument] = {
        name: declaration for group in groups for name, declaration in list_declared(group).items()
    }
    aliases = {
        alias: name
        for group in groups
        for name, declaration in list_declared(group).items()
        for alias in declaration.aliases
    }
    parsers = {n: a.parse for n, a in known.items()} | {name: OF_MODELS[form] for name, form in of_models.items()}
    given = {key: value for key, value in items.items() if value is not None}
    given = _with_dropout(given, neuron_dropout, parsers["neuron_dropout"])
    for key, value in given.items():
        if aliases.get(key, key) not in parsers:
            hint = _suggest(key, parsers, aliases, known)
            message = f"--network_args {key}={value}: there is no argument {key}; {hint}"
            raise UserError(message, setting=f"--network_args {key}")
    parsed = {key: _parse(key, value, aliases.get(key, key), parsers) for key, value in given.items()}
    of_model = {key: value for key, value in parsed.items() if key in of_models}
    values = _merge_aliases({key: value for key, value in parsed.items() if key not in of_models}, aliases)
    group_values = {
        group: group(**{name: values[name] for name in list_declared(group) if name in values}) for group in groups
    }
    arguments = NetworkArguments(group_values, of_model)
    _warn_of_idle(arguments, known, in_file)
    return arguments


def _suggest(unknown: str, parsers: Collection[str], aliases: Mapping[str, str], known: Mapping[str, Argument]) -> str:
    nearest = nearest_name(unknown, (*parsers, *aliases), least=0.5)
    if nearest is None:
        return f"known: {', '.join(parsers)}"
    declared = known.get(aliases.get(nearest, nearest))
    return f"did you mean {nearest}? {declared.help if declared else ''}".rstrip()


def _with_dropout(given: dict[str, Any], neuron_dropout: float | None, parse: Parse) -> dict[str, Any]:
    """Merge `network_dropout` and its aliases into `neuron_dropout`. Raises UserError if they differ."""
    dropouts = {
        name: _parse(name, given.pop(name), "neuron_dropout", {"neuron_dropout": parse})
        for name in DROPOUTS
        if name in given
    }
    for name, dropout in dropouts.items():
        chosen = dropout if neuron_dropout is None else neuron_dropout
        if float(dropout) != float(given.setdefault("neuron_dropout", chosen)):
            other = "--network_dropout" if neuron_dropout is not None else DROPOUTS[0]
            raise UserError(
                f"{other} is {given['neuron_dropout']} but --network_args says {name}={dropout}; they mean the same, "
                "give one of them",
                setting=f"--network_args {name}",
                others=[other],
                cause="does not fit",
            )
    if neuron_dropout is not None:
        given["neuron_dropout"] = neuron_dropout
    return given


def _parse(key: str, value: Any, name: str, parsers: Mapping[str, Parse]) -> Any:
    """Parse one value. Raises UserError naming the argument as the user spelled it."""
    # A pattern may contain commas, so a list of patterns is parsed as a Python literal.
    is_list = isinstance(value, (list, tuple)) and not name.endswith("_patterns")
    text = ",".join(map(str, value)) if is_list else str(value)
    try:
        return parsers[name](text)
    except ValueError as error:
        flag = "--network_dropout" if key == "neuron_dropout" else f"--network_args {key}"
        raise UserError(f"{flag}={text}: {error}", setting=flag) from None


def _merge_aliases(values: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the values with aliases replaced by argument names. Raises UserError if two spellings differ."""
    merged = {key: value for key, value in values.items() if key not in aliases}
    for key, name in aliases.items():
        if key in values and merged.setdefault(name, values[key]) != values[key]:
            raise UserError(
                f"--network_args {key}={values[key]} and {name}={values[name]} mean the same and differ; "
                "give one of them",
                setting=f"--network_args {key}",
                others=[f"--network_args {name}"],
                cause="does not fit",
            )
    return merged


def _warn_of_idle(arguments: NetworkArguments, known: Mapping[str, Argument], in_file: Collection[str]) -> None:
    """Warn about arguments that have no effect without another one."""
    given = arguments.given
    present = {*given, *in_file}
    idle: dict[str, list[str]] = {}
    for name in given:
        requires = known[name].requires if name in known else None
        if requires is not None and not all(any(other in present for other in names) for names in requires.names):
            idle.setdefault(requires.words, []).append(name)
    for words, names in idle.items():
        logger.warning("--network_args %s has no effect without %s", ", ".join(names), words)
