"""What a network is made of, in a few lines for the log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from networks.core.adapter import Adapter
from networks.core.files.reading_writing import DORA_SCALE, MID, SCALAR, AnyAdapter
from networks.core.sites.targets import BlockList

FORMS = {DORA_SCALE: "DoRA", MID: "a Tucker core", SCALAR: "a trained strength"}  # state -> in a user's words


def describe_part(part: str, adapters: Sequence[AnyAdapter], layout: BlockList | None) -> Iterator[str]:
    """Modules, ranks, alphas, forms and parameters of one part of the base model; by block where blocks differ."""
    modules = [adapter for adapter in adapters if isinstance(adapter, Adapter)]
    num_norms = len(adapters) - len(modules)
    num_values = sum(p.numel() for adapter in adapters for p in adapter.parameters())
    forms = [
        f"{words} in {count}"
        for leaf, words in FORMS.items()
        if (count := sum(leaf in adapter.state_dict() for adapter in modules))
    ]
    forms += [f"{num_norms} norms"] if num_norms else []
    yield (
        f"{part}: {len(modules)} modules adapted, {_ranks(modules)}, {num_values:,} parameters"
        + "".join(f"; {form}" for form in forms)
    )
    if layout is None:
        return
    blocks: dict[int, list[Adapter]] = {}
    for module in modules:
        if (block := layout.index_of(module.site.path)) is not None:
            blocks.setdefault(block, []).append(module)
    if any(len({_measure(module) for module in modules if module.site.kind == kind}) > 1 for kind in ("plain", "conv")):
        for block, inside in sorted(blocks.items()):
            yield f"  block {block}: {len(inside)} modules, {_ranks(inside)}"


def describe_rates(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The learning rate groups of the optimizer: name, rate, number of trained values."""
    parts = [
        f"{name} {group['lr']:g} ({sum(p.numel() for p in group['params']):,} parameters)"
        for group, name in zip(groups, names, strict=True)
    ]
    return "learning rates: " + ", ".join(parts)


def _measure(module: Adapter) -> tuple[int, float]:
    return module.delta.rank, module.alpha_value


def _ranks(modules: Sequence[Adapter]) -> str:
    ranks = ", ".join(str(rank) for rank in sorted({module.delta.rank for module in modules}))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({module.alpha_value for module in modules}))
    return f"rank {ranks}, alpha {alphas}"
