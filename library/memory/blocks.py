"""Runners for the blocks of a model, the only place that decides on recomputing, offloading or compiling a block.

A denoiser passes each block to its runner instead of calling it, and does not depend on the kind of runner.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.memory.cast_together import cast_factors


class BlockRunner(Protocol):
    """A function that runs one block and returns its output. Every pass runs the same blocks in the same order."""

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any: ...


Stacks = Sequence[Sequence[nn.Module]]
"""The blocks that a model passes to its runner, roughly in execution order: one sequence per kind of block."""


class RunsBlocks(Protocol):
    """One of our models, which passes its blocks to a runner."""

    runner: BlockRunner

    def stacks(self) -> Stacks: ...


def plain(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Run a block once; autograd keeps what it needs."""
    with cast_factors(block.block if isinstance(block, BlockBody) else block):
        return block(*inputs, **named)


def recompute(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Keep only a block's inputs and run it again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
    return run_checkpointed(True, block, *inputs, **named)


def recompute_without_randomness(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """Recompute a block for which `draws_nothing` holds. The states of random generators, which take a tenth of the
    host's time for a recomputed block, are not kept."""
    return run_checkpointed(False, block, *inputs, **named)


def run_checkpointed(preserve_rng_state: bool, block: nn.Module, *inputs: Any, **named: Any) -> Any:
    # Without gradients there is no second run, and checkpointing would only cost time.
    if not torch.is_grad_enabled():
        return plain(block, *inputs, **named)
    return checkpoint(plain, block, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state, **named)


def draws_nothing(model: nn.Module) -> bool:
    """Return True if the forward of a model draws no random numbers: it is in evaluation mode, and all of its modules
    are known libraries' or ours."""
    known = ("torch", "library", "diffusers", "transformers")
    modules = list(model.modules())
    return not any(m.training or type(m).__module__.partition(".")[0] not in known for m in modules)


class Every:
    """A runner that uses another runner for every n-th block and runs the others unchanged.

    Blocks are numbered in the order of their first call.
    """

    def __init__(self, n: int, runner: BlockRunner) -> None:
        self.n = n
        self.runner = runner
        self.numbers: dict[nn.Module, int] = {}

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        number = self.numbers.setdefault(block, len(self.numbers))
        return (plain if number % self.n else self.runner)(block, *inputs, **named)


def stacks_of(model: nn.Module) -> Stacks:
    return cast(RunsBlocks, model).stacks()


def run_blocks_with(model: nn.Module, runner: BlockRunner) -> None:
    cast(RunsBlocks, model).runner = runner


def chains_of(model: nn.Module) -> list[nn.ModuleList]:
    """Return the block lists of one of our models. Within a list each block takes the output of the previous one."""
    return [child for child in model.children() if isinstance(child, nn.ModuleList)]


class BlockBody(nn.Module):
    """A library's block as it is passed to a runner: a call runs the block's own code, not the runner again."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        # The class's forward is needed, because the block's own attribute `forward` calls the runner.
        self.run: Callable[..., Any] = type(block).forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.run(self.block, *inputs, **named)


def run_library_blocks_with(blocks: Iterable[nn.Module], runner: BlockRunner) -> None:
    """Route calls of a library model's blocks through `runner`. A later call replaces the runner.

    The module tree, class names and hooks are unchanged: only the `forward` of each block is replaced.
    """
    for block in blocks:
        block.forward = partial(runner, BlockBody(block))


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers text encoder, in execution order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in encoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def run_encoder_layers_with(encoder: nn.Module, runner: BlockRunner) -> None:
    """Route the layers of a transformers text encoder through `runner`."""
    # Its own gradient checkpointing works only in train mode, which would also enable the base model's dropout.
    run_library_blocks_with(encoder_layers(encoder), runner)
