"""How the blocks of a model run: the one place where recomputing (and whatever else changes a block's run) is decided.

A denoiser hands each block to the runner it was given instead of calling it; it knows nothing of what the runner does.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class BlockRunner(Protocol):
    """Runs one block and gives what it gives; the same block, called in the same order, in every pass."""

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any: ...


Stacks = Sequence[Sequence[nn.Module]]
"""The blocks of a model that its runner runs, about in the order of a pass: one sequence for each kind of block."""


class RunsBlocks(Protocol):
    """A model of ours that hands its blocks to a runner."""

    runner: BlockRunner

    def stacks(self) -> Stacks: ...


def plain(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Run a block as it is; autograd keeps whatever it needs."""
    return block(*inputs, **named)


def recompute(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Keep only a block's inputs and run it again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
    # Without gradients there is no second run, and the machinery of the first one would only cost time.
    if not torch.is_grad_enabled():
        return block(*inputs, **named)
    return checkpoint(block, *inputs, use_reentrant=False, **named)


class Every:
    """Runs every n-th block with a runner and the others plainly; blocks are counted in the order they first come."""

    def __init__(self, n: int, runner: BlockRunner) -> None:
        self.n = n
        self.runner = runner
        self.numbers: dict[nn.Module, int] = {}

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        number = self.numbers.setdefault(block, len(self.numbers))
        return (plain if number % self.n else self.runner)(block, *inputs, **named)


def stacks_of(model: nn.Module) -> Stacks:
    """The blocks of a model of ours."""
    return cast(RunsBlocks, model).stacks()


def run_blocks_with(model: nn.Module, runner: BlockRunner) -> None:
    """Give a model of ours its runner."""
    cast(RunsBlocks, model).runner = runner


def chains_of(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of a model of ours: each block takes what the one before it gives."""
    return [child for child in model.children() if isinstance(child, nn.ModuleList)]


class BlockBody(nn.Module):
    """A block of a library's model as a runner sees it: calling it runs the block's own code, not the runner again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        # The class's forward: the block's own attribute `forward` is the way into the runner.
        self.run: Callable[..., Any] = type(block).forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self.block, *inputs, **named)


def run_library_blocks_with(blocks: Iterable[nn.Module], runner: BlockRunner) -> None:
    """Lead the calls of blocks that belong to a library's model through `runner`; a later call replaces the runner.

    The module tree, its class names and its hooks stay as they are: only each block's `forward` is shadowed.
    """
    for block in blocks:
        block.forward = partial(runner, BlockBody(block))


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a text encoder of transformers, in the order of a pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in encoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def run_encoder_layers_with(encoder: nn.Module, runner: BlockRunner) -> None:
    """Lead the layers of a text encoder of transformers through `runner`.

    Its own switch for recomputing works in train mode only, which also turns the base model's dropout on.
    """
    run_library_blocks_with(encoder_layers(encoder), runner)
