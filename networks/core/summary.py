"""What a network is made of, in a few lines for the log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from networks.core.adapter import Adapter
from networks.core.kinds.scaled import ScaledDelta
from networks.core.sites.targets import BlockList

FORMS = ("DoRA", "a Tucker core", "a trained strength")  # of `ScaledDelta.forms`, in this order


def describe_part(part: str, adapters: Sequence[Adapter], layout: BlockList | None) -> Iterator[str]:
    """Modules, ranks, alphas, forms and parameters of one part of the base model; by block where blocks differ."""
    modules = [(a.site, a.change) for a in adapters if isinstance(a.change, ScaledDelta)]
    num_norms = len(adapters) - len(modules)
    num_values = sum(p.numel() for a in adapters if isinstance(a.change, nn.Module) for p in a.change.parameters())
    forms = [f"{words} in {count}" for words in FORMS if (count := sum(words in change.forms for _, change in modules))]
    forms += [f"{num_norms} norms"] if num_norms else []
    yield (
        f"{part}: {len(modules)} modules adapted, {_ranks([change for _, change in modules])}, "
        f"{num_values:,} parameters" + "".join(f"; {form}" for form in forms)
    )
    if layout is None:
        return
    blocks: dict[int, list[ScaledDelta]] = {}
    for site, change in modules:
        if (block := layout.index_of(site.path)) is not None:
            blocks.setdefault(block, []).append(change)
    if any(len({_measure(change) for site, change in modules if site.kind == kind}) > 1 for kind in ("plain", "conv")):
        for block, inside in sorted(blocks.items()):
            yield f"  block {block}: {len(inside)} modules, {_ranks(inside)}"


def describe_rates(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The learning rate groups of the optimizer: name, rate, number of trained values."""
    parts = [
        f"{name} {group['lr']:g} ({sum(p.numel() for p in group['params']):,} parameters)"
        for group, name in zip(groups, names, strict=True)
    ]
    return "learning rates: " + ", ".join(parts)


def _measure(change: ScaledDelta) -> tuple[int, float]:
    return change.delta.rank, change.alpha_value


def _ranks(changes: Sequence[ScaledDelta]) -> str:
    ranks = ", ".join(str(rank) for rank in sorted({change.delta.rank for change in changes}))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({change.alpha_value for change in changes}))
    return f"rank {ranks}, alpha {alphas}"
