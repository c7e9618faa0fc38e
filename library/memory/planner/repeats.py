"""Blocks that are alike: a few of them are counted and stand for all.

A stack is a list of blocks that a model runs one after another. In it, neighbours that are built alike, adapters
included, form a run; two of each run are counted, and the second stands for those that are left out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from torch import nn

NUM_COUNTED = 2  # of each run; the first may be another in the backward pass, where nothing before it is trained


def build_of(block: nn.Module) -> tuple[Any, ...]:
    """What makes blocks alike: classes and shapes of all modules in it, and of what took a layer's `forward` over."""
    return tuple((name, type(module), shapes_of(module), taken_over(module)) for name, module in block.named_modules())


def shapes_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False))


def taken_over(module: nn.Module) -> Any:
    """Class and shapes of the adapter of a layer, None where it has none: adapters replace `forward` of an instance."""
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    if not isinstance(owner, nn.Module):
        return None
    return type(owner), tuple((name, tuple(p.shape)) for name, p in owner.named_parameters())


def runs_of(stack: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """A stack as runs of blocks that are alike."""
    return [list(run) for _, run in groupby(stack, build_of)]


@contextmanager
def shortened(stacks: Sequence[nn.ModuleList]) -> Iterator[Mapping[nn.Module, Sequence[nn.Module]]]:
    """Leave two blocks of each run in the stacks for a while; gives for which blocks one that is left stands."""
    whole = [list(stack) for stack in stacks]
    stands_for: dict[nn.Module, Sequence[nn.Module]] = {}
    try:
        for stack in stacks:
            kept: list[nn.Module] = []
            for run in runs_of(stack):
                kept += run[:NUM_COUNTED]
                stands_for |= {block: [block] for block in run[: NUM_COUNTED - 1]}
                stands_for[kept[-1]] = run[NUM_COUNTED - 1 :] or [kept[-1]]
            replace_blocks(stack, kept)
        yield stands_for
    finally:
        for stack, blocks in zip(stacks, whole, strict=True):
            replace_blocks(stack, blocks)


def replace_blocks(stack: nn.ModuleList, blocks: Sequence[nn.Module]) -> None:
    del stack[:]
    stack.extend(blocks)
