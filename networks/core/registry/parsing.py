"""Network arguments of all kinds, and their parsing."""

from collections.abc import Collection, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from library.checkpoints.base_model_spec import ArgumentForm
from library.options.declared import Declared, list_declared
from networks.core.arguments.common import COMMON, check_blocks
from networks.core.arguments.network_arguments import NetworkArguments, read_groups
from networks.core.changes.dora import DoraArguments
from networks.core.changes.ggpo import GgpoArguments
from networks.core.changes.init import InitArguments
from networks.core.changes.tlora import TLoraArguments
from networks.core.registry.adapter_kind import AdapterKind, Wrapper
from networks.core.registry.layouts import list_kinds

WRAPPERS: tuple[type[Wrapper], ...] = (GgpoArguments, TLoraArguments, InitArguments)


@cache
def list_groups() -> tuple[type, ...]:
    return (*COMMON, DoraArguments, *WRAPPERS, *dict.fromkeys(kind.arguments for kind in list_kinds()))


@cache
def list_arguments() -> Mapping[str, Declared]:
    """Return the declaration of every network argument except those of base models."""
    return {name: declaration for group in list_groups() for name, declaration in list_declared(group).items()}


def parse_arguments(
    items: Mapping[str, Any],
    neuron_dropout: float | None = None,
    of_models: Mapping[str, ArgumentForm] = MappingProxyType({}),
    in_file: Collection[str] = (),
) -> NetworkArguments:
    """Parse the network arguments that a user gave, as in `read_groups`, for all kinds and wrappers."""
    arguments = read_groups(list_groups(), items, neuron_dropout, of_models, in_file)
    check_blocks(arguments)
    return arguments


def list_ignored(kind: AdapterKind, arguments: NetworkArguments) -> Mapping[str, list[str]]:
    """Return the given arguments that belong to other kinds only, by the network modules of those kinds."""
    kind_names = list_declared(kind.arguments)
    names_by_owner: dict[str, list[str]] = {}
    names = [name for other in list_kinds() for name in list_declared(other.arguments)]
    for name in dict.fromkeys(names):
        if name in arguments.given and name not in kind_names:
            owners = [other.network_module for other in list_kinds() if name in list_declared(other.arguments)]
            names_by_owner.setdefault(" and ".join(filter(None, (", ".join(owners[:-1]), owners[-1]))), []).append(name)
    return names_by_owner
