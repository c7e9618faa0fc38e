"""Typed network arguments: `--network_args "key=value"` parsed into dataclasses.

A group is a frozen dataclass with fields made by `declare`. Groups for all adapters are in arguments/common.py. A
core feature such as DoRA declares its group next to its implementation, an adapter kind in its own file.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from library.base.errors import UserError, error_in
from library.base.suggestions import nearest_name
from library.checkpoints.base_model_spec import ArgumentForm
from library.options.declared import Declared, Needs, list_aliases, list_declared
from library.options.kinds import TEXT, Kind, parse_text
from library.options.other_programs import explain_name
from networks.core.arguments.values import RANK, RANKS, SELECTION, SWITCH

logger = logging.getLogger(__name__)

Group = TypeVar("Group")


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


OF_MODELS: Mapping[ArgumentForm, Kind] = {  # kinds of arguments that base models define in AdapterTargets
    "rank": RANK,
    "ranks": RANKS,
    "blocks": SELECTION,
    "flag": SWITCH,
    "word": TEXT,
}

DROPOUT, DROPOUT_FLAG = "neuron_dropout", "--network_dropout"  # the option is another spelling of the argument


def read_groups(
    groups: Sequence[type[Any]],
    items: Mapping[str, Any],
    neuron_dropout: float | None = None,
    of_models: Mapping[str, ArgumentForm] = MappingProxyType({}),
    in_file: Collection[str] = (),
) -> NetworkArguments:
    """Parse the network arguments that a user gave; None means not given.

    `of_models` maps the arguments of base models to the form of their values; `neuron_dropout` is `network_dropout`.
    `in_file` names arguments whose feature the file of the weights has. Raises UserError naming the argument for an
    unknown key, an invalid value, or two spellings with different values. Warns about arguments that have no effect
    without another one.
    """
    known = {name: declared for group in groups for name, declared in list_declared(group).items()}
    aliases = {DROPOUT_FLAG: DROPOUT}  # kinds that share an argument may spell it differently
    for group in groups:
        aliases |= list_aliases(list_declared(group))
    kinds = {name: declared.kind for name, declared in known.items()}
    kinds |= {name: OF_MODELS[form] for name, form in of_models.items()}
    given = {key: value for key, value in {DROPOUT_FLAG: neuron_dropout, **items}.items() if value is not None}
    for key, value in given.items():
        if aliases.get(key, key) not in kinds:
            hint = _suggest(key, kinds, aliases, known)
            message = f"--network_args {key}={value}: there is no argument {key}; {hint}"
            raise error_in(f"--network_args {key}")(message)
    values = _merge_aliases(given, aliases, kinds)
    of_model = {key: value for key, value in values.items() if key in of_models}
    group_values = {
        group: group(**{name: values[name] for name in list_declared(group) if name in values}) for group in groups
    }
    arguments = NetworkArguments(group_values, of_model)
    _warn_of_idle(arguments, known, in_file)
    return arguments


def _suggest(unknown: str, kinds: Collection[str], aliases: Mapping[str, str], known: Mapping[str, Declared]) -> str:
    if hint := explain_name(unknown):
        return hint
    nearest = nearest_name(unknown, (*kinds, *aliases), least=0.5)
    if nearest is None:
        return f"known: {', '.join(kinds)}"
    declared = known.get(aliases.get(nearest, nearest))
    return f"did you mean {nearest}? {declared.help if declared else ''}".rstrip()


def _parse(key: str, value: Any, name: str, kind: Kind) -> Any:
    """Parse one value. Raises UserError naming the argument as the user spelled it."""
    # A pattern may contain commas, so a list of patterns is parsed as a Python literal.
    is_list = isinstance(value, (list, tuple)) and not name.endswith("_patterns")
    text = ",".join(map(str, value)) if is_list else str(value)
    try:
        return parse_text(text, kind)
    except UserError as error:
        raise error_in(_as_typed(key))(f"{_as_typed(key)}={text}: {error}") from None


def _as_typed(key: str) -> str:
    return key if key == DROPOUT_FLAG else f"--network_args {key}"


def _merge_aliases(given: Mapping[str, Any], aliases: Mapping[str, str], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the values parsed, by the names of the arguments. Raises UserError if two spellings differ."""
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for key, value in given.items():
        name = aliases.get(key, key)
        parsed = _parse(key, value, name, kinds[name])
        if values.setdefault(name, parsed) != parsed:
            other = spellings[name]
            same = f"{_as_typed(key)}={value} and {other}={given[other]}"
            raise error_in(_as_typed(key), others=[_as_typed(other)], cause="does not fit")(
                f"{same} mean the same and differ", "give one of them"
            )
        spellings[name] = key
    return values


def _warn_of_idle(arguments: NetworkArguments, known: Mapping[str, Declared], in_file: Collection[str]) -> None:
    """Warn about arguments that have no effect without another one."""
    given = arguments.given
    present = {*given, *in_file}
    idle: dict[str, list[str]] = {}
    for name in given:
        needs = known[name].needs if name in known else Needs()
        if not all(any(other in present for other in names) for names in needs.groups):
            idle.setdefault(needs.words, []).append(name)
    for words, names in idle.items():
        logger.warning("--network_args %s has no effect without %s", ", ".join(names), words)
