"""What a network is made of, in a few lines for the log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Change
from networks.core.changes.orthogonal import Orthogonal
from networks.core.kinds.norm import Norm
from networks.core.kinds.qkv_pieces import changes_in
from networks.core.kinds.rotations.oft import OrthogonalOutputs
from networks.core.targets.targets import BlockList

FORMS = ("DoRA", "DoRA per output", "a Tucker core", "a trained strength")  # of `ScaledDelta.forms`, in this order


def describe_part(part: str, adapters: Sequence[Adapter], layout: BlockList | None) -> Iterator[str]:
    """Modules, ranks, alphas, forms and parameters of one part of the base model; by block where blocks differ."""
    num_norms = sum(isinstance(a.change, Norm) for a in adapters)
    modules = [
        (a.target, change) for a in adapters if not isinstance(a.change, Norm) for change in changes_in(a.change)
    ]
    num_values = sum(p.numel() for a in adapters if isinstance(a.change, nn.Module) for p in a.change.parameters())
    scaled = [change for _, change in modules if isinstance(change, ScaledDelta)]
    forms = [f"{words} in {count}" for words in FORMS if (count := sum(words in change.forms for change in scaled))]
    forms += [f"{num_norms} norms"] if num_norms else []
    yield (
        f"{part}: {len(modules)} modules adapted, {_ranks([change for _, change in modules])}, "
        f"{num_values:,} parameters" + "".join(f"; {form}" for form in forms)
    )
    if layout is None:
        return
    blocks: dict[int, list[Change]] = {}
    for target, change in modules:
        if (block := layout.index_of(target.path)) is not None:
            blocks.setdefault(block, []).append(change)
    if any(
        len({_measure(change) for target, change in modules if target.kind == kind}) > 1 for kind in ("plain", "conv")
    ):
        for block, inside in sorted(blocks.items()):
            yield f"  block {block}: {len(inside)} modules, {_ranks(inside)}"


def describe_rates(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The learning rate groups of the optimizer: name, rate, number of trained values."""
    parts = [
        f"{name} {group['lr']:g} ({sum(p.numel() for p in group['params']):,} parameters)"
        for group, name in zip(groups, names, strict=True)
    ]
    return "learning rates: " + ", ".join(parts)


def _measure(change: Change) -> tuple[int, float]:
    if isinstance(change, (Orthogonal, OrthogonalOutputs)):
        return change.block_sizes[0], 0.0
    assert isinstance(change, ScaledDelta)
    return change.delta.rank, change.alpha_value


def _ranks(changes: Sequence[Change]) -> str:
    blocks = [change.block_sizes for change in changes if isinstance(change, (Orthogonal, OrthogonalOutputs))]
    turned = sorted({size for sizes in blocks for size in sizes})
    scaled = [change for change in changes if isinstance(change, ScaledDelta)]
    ranks = ", ".join(str(rank) for rank in sorted({change.delta.rank for change in scaled}))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({change.alpha_value for change in scaled}))
    sizes = [f"blocks of {', '.join(map(str, turned))}"] if turned else []
    return ", ".join([*sizes, *([f"rank {ranks}, alpha {alphas}"] if scaled or not turned else [])])
