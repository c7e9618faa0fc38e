"""Selection of target modules by network arguments, including arguments that only one base model defines."""

import logging
import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from library.base.errors import error_in
from networks.core.arguments.common import RankArguments, StructureArguments, TargetArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.arguments.values import Selection
from networks.core.targets.targets import (
    AdapterTargets,
    Filters,
    Part,
    TargetModule,
    count_blocks,
    find_embedders,
    find_target_modules,
)

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Expressions(Generic[Value]):
    """Entries (regular expression, value) of network_reg_dims or network_reg_lrs. The first match decides."""

    entries: tuple[tuple[str, Value], ...]
    targets: AdapterTargets  # says whether they may be parts of names too, or must be whole paths

    def find(self, target: TargetModule) -> tuple[int, Value] | None:
        """Return (index of the entry, its value) of the first match, or None."""
        for index, (expression, value) in enumerate(self.entries):
            if self.fits(expression, target):
                return index, value
        return None

    def fits(self, expression: str, target: TargetModule) -> bool:
        """Return True if an expression fits the path of a module or, where that is allowed, a part of its name."""
        is_path = re.fullmatch(expression, target.path) is not None
        if is_path or self.targets.expressions == "path":
            return is_path
        # sd-scripts' networks.lora searches parts of names, its LoHa and LoKr match whole paths; either form finds a
        # module.
        return any(re.search(expression, name) for name in self.targets.spelled(target.name))


@dataclass(frozen=True)
class Choices:
    """Ranks by type of layer, ranks of embedders, and excluded blocks of the denoiser."""

    targets: AdapterTargets
    arguments: NetworkArguments

    def rank_of(self, target: TargetModule, rank: int) -> int:
        """Return the rank of a module: `rank` if no argument changes it, 0 in an excluded block."""
        for name, pattern in self.targets.block_choices.items():
            match = re.search(pattern, target.path)
            selection = self.arguments.of_model.get(name)
            if match and isinstance(selection, Selection) and not selection.has(int(match[1])):
                return 0
        for name, pattern in self.targets.ranks.items():
            if name in self.arguments.of_model and re.search(pattern, target.path):
                return int(self.arguments.of_model[name])
        return self._embedder_rank(target, rank)

    def _embedder_rank(self, target: TargetModule, rank: int) -> int:
        """Return the rank of a module that may be an embedder. For larger convolutions conv_dim has priority."""
        embedders = self.targets.embedders
        if embedders is None or embedders.argument not in self.arguments.of_model:
            return rank
        index = embedders.index_of(target.path)
        if index is None or (target.kind == "conv" and self.arguments.of(RankArguments).conv_dim is not None):
            return rank
        return int(self.arguments.of_model[embedders.argument][index])


def select_targets(
    part: Part, root: nn.Module, targets: AdapterTargets, arguments: NetworkArguments, classes: tuple[str, ...]
) -> list[TargetModule]:
    """Return the target modules in blocks of the given classes that no argument excludes, and the requested embedders.

    Some of them can get rank 0.
    """
    classes += extra_classes(part, arguments)
    target_modules = find_target_modules(part, root, classes, build_filters(arguments))
    if part is not targets.denoiser:
        return target_modules
    subset = targets.subsets.get(arguments.of_model.get("train_blocks", "all"))
    kept = [target for target in target_modules if subset is None or re.search(subset, target.path)]
    embedders = targets.embedders
    if embedders is None or embedders.argument not in arguments.of_model:
        return kept
    return kept + find_embedders(part, root, embedders, target_modules)


def build_filters(arguments: NetworkArguments) -> Filters:
    """Return the filters from the user's patterns."""
    patterns = arguments.of(TargetArguments)
    return Filters(patterns.exclude_patterns, patterns.include_patterns, patterns.only_patterns)


def list_targets(part: Part, root: nn.Module, targets: AdapterTargets) -> list[TargetModule]:
    """Return every module that any argument could adapt."""
    classes = part.blocks + part.conv_blocks + tuple(name for names in part.extra_blocks.values() for name in names)
    target_modules = find_target_modules(part, root, classes, Filters(include=(".*",)))
    if part is targets.denoiser and targets.embedders is not None:
        target_modules += find_embedders(part, root, targets.embedders, target_modules)
    return target_modules


def extra_classes(part: Part, arguments: NetworkArguments) -> tuple[str, ...]:
    """Return the block classes that arguments add to the search."""
    class_lists = (names for argument, names in part.extra_blocks.items() if arguments.of_model.get(argument))
    return tuple(name for names in class_lists for name in names)


def check_choices(targets: AdapterTargets, arguments: NetworkArguments, denoiser: nn.Module) -> None:
    """Raise UserError for a choice that the base model does not have; warn about arguments of other base models."""
    given = arguments.of_model
    for name, pattern in targets.block_choices.items():
        num_blocks = count_blocks(denoiser, pattern)
        indices = given[name].indices if name in given else None
        if indices and max(indices) >= num_blocks:
            raise error_in(f"--network_args {name}")(
                f"--network_args {name} names block {max(indices)}, but the base model has {num_blocks} of them: "
                f"0 to {num_blocks - 1}"
            )
    embedders = targets.embedders
    if embedders is not None and len(given.get(embedders.argument, embedders.patterns)) != len(embedders.patterns):
        raise error_in(f"--network_args {embedders.argument}")(
            f"--network_args {embedders.argument} has {len(given[embedders.argument])} entries; it needs "
            f"{len(embedders.patterns)}: {', '.join(p.replace(chr(92), '') for p in embedders.patterns)}"
        )
    subset = given.get("train_blocks", "all")
    if targets.subsets and subset not in ("all", *targets.subsets):
        raise error_in("--network_args train_blocks")(
            f"--network_args train_blocks={subset}: this base model has {', '.join(('all', *targets.subsets))}"
        )
    foreign = sorted(given.keys() - targets.arguments.keys())
    foreign += ["split_qkv"] if arguments.of(StructureArguments).split_qkv and not targets.fused else []
    if foreign:
        logger.warning("--network_args %s has no effect: it belongs to other base models", ", ".join(foreign))
