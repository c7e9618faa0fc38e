"""Log lines that summarise a network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.change import ChangeSize
from networks.core.changes.qkv_pieces import changes_in
from networks.core.targets.targets import BlockList, TargetModule

FORMS: Mapping[str, Callable[[ChangeSize], bool]] = {  # names in log lines
    "DoRA": lambda size: size.magnitudes == "input",
    "DoRA per output": lambda size: size.magnitudes == "output",
    "a Tucker core": lambda size: size.has_core,
    "a trained strength": lambda size: size.has_scalar,
}


def describe_part(part: str, adapters: Sequence[Adapter], layout: BlockList | None) -> Iterator[str]:
    """Yield log lines on one part of the base model: modules, ranks, alphas, parameters; by block if blocks differ."""
    num_norms = sum(a.target.kind == "norm" for a in adapters)
    modules = [(a.target, change.size) for a in adapters if a.target.kind != "norm" for change in changes_in(a.change)]
    num_values = sum(p.numel() for a in adapters if isinstance(a.change, nn.Module) for p in a.change.parameters())
    scaled = [size for _, size in modules if size.has_ranks]
    forms = [f"{words} in {count}" for words, has_it in FORMS.items() if (count := sum(map(has_it, scaled)))]
    forms += [f"{num_norms} norms"] if num_norms else []
    yield (
        f"{part}: {len(modules)} modules adapted, {_ranks([size for _, size in modules])}, "
        f"{num_values:,} parameters" + "".join(f"; {form}" for form in forms)
    )
    measures = {(target.kind, _measure(size)) for target, size in modules}
    if layout is not None and len(measures) > len({kind for kind, _ in measures}):
        yield from _describe_blocks(modules, layout)


def _describe_blocks(modules: Sequence[tuple[TargetModule, ChangeSize]], layout: BlockList) -> Iterator[str]:
    blocks: dict[int, list[ChangeSize]] = {}
    for target, size in modules:
        if (block := layout.index_of(target.path)) is not None:
            blocks.setdefault(block, []).append(size)
    for block, sizes in sorted(blocks.items()):
        yield f"  block {block}: {len(sizes)} modules, {_ranks(sizes)}"


def describe_rates(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return a log line with the optimizer's parameter groups: name, learning rate, number of parameters."""
    parts = [
        f"{name} {group['lr']:g} ({sum(p.numel() for p in group['params']):,} parameters)"
        for group, name in zip(groups, names, strict=True)
    ]
    return "learning rates: " + ", ".join(parts)


def _measure(size: ChangeSize) -> tuple[int | None, float]:
    return (size.block_sizes[0], 0.0) if size.block_sizes else (size.rank, size.alpha)


def _ranks(sizes: Sequence[ChangeSize]) -> str:
    rotation_sizes = sorted({block_size for size in sizes for block_size in size.block_sizes})
    scaled = [size for size in sizes if size.has_ranks]
    ranks = ", ".join(map(str, sorted({size.rank for size in scaled if size.rank is not None})))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({size.alpha for size in scaled}))
    blocks = [f"blocks of {', '.join(map(str, rotation_sizes))}"] if rotation_sizes else []
    return ", ".join([*blocks, *([f"rank {ranks}, alpha {alphas}"] if scaled or not rotation_sizes else [])])
