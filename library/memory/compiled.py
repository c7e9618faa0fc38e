"""Blocks compiled with torch.compile, once for each kind of block."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from library.memory.blocks import BlockRunner
from library.memory.frozen import frozen_layers
from library.memory.offload.sharded import ShardedHandle
from library.memory.offload.streamed import OffloadedHandle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileSettings:
    """Settings of torch.compile for blocks.

    torch's automatic mode, a static graph followed by a dynamic one, is not supported. Both match the first size, so a
    recomputed block could run the other graph, which saves different tensors.
    """

    backend: Any = "inductor"
    mode: str | None = None
    is_dynamic: bool = True  # one graph for all sizes instead of one per size
    needs_full_graph: bool = False
    most_graphs: int = 128  # per kind of block


class CompiledBlock(nn.Module):
    """A block as it is passed to a runner, compiled at its first call with gradients.

    Without gradients, as in previews and validation, it runs uncompiled, because other sizes would trigger
    compilations. It also runs uncompiled while operations are counted, because torch never compiles a frame that it
    once skipped.
    """

    def __init__(
        self, block: nn.Module, settings: CompileSettings, begun_kinds: set[type], warned_kinds: set[type]
    ) -> None:
        """`begun_kinds` collects kinds whose compilation was logged, `warned_kinds` those that reached the limit."""
        super().__init__()
        self.block = block
        self.settings = settings
        self.begun_kinds, self.warned_kinds = begun_kinds, warned_kinds
        # The bound method runs the block's hooks and adapters. torch would wrap the module itself in another one.
        self.run: Any = torch.compile(
            block.__call__,
            backend=settings.backend,
            mode=settings.mode,
            dynamic=settings.is_dynamic,
            fullgraph=settings.needs_full_graph,
        )

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
            return self.block(*inputs, **named)
        from torch import _dynamo

        if self.kind not in self.begun_kinds:
            self.begun_kinds.add(self.kind)
            logger.info("compiling %s; the first steps can take minutes", self.kind.__name__)
        # These settings are per thread, and autograd recomputes blocks in its own threads.
        _dynamo.config.recompile_limit = self.settings.most_graphs
        # The second limit is on all blocks that share code; 256 is torch's default.
        _dynamo.config.accumulated_recompile_limit = max(256, 4 * self.settings.most_graphs)
        # At the limit dynamo would otherwise run the block uncompiled with a message that does not name the option.
        _dynamo.config.fail_on_recompile_limit_hit = True
        try:
            return self.run(*inputs, **named)
        except _dynamo.exc.FailOnRecompileLimitHit:
            if self.settings.needs_full_graph:
                raise
            self.warn_once((inputs, named))
        return self.block(*inputs, **named)

    @property
    def kind(self) -> type:
        """The class of the block, without the BlockBody that wraps a library's block."""
        return type(getattr(self.block, "block", self.block))

    def warn_once(self, inputs: Any) -> None:
        """Warn once per kind of block, with the shapes of the first inputs that run uncompiled."""
        if self.kind in self.warned_kinds:
            return
        self.warned_kinds.add(self.kind)
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim > 1)
        logger.warning(
            "%s was compiled %d times (--compile_cache_size_limit); inputs of new sizes run uncompiled from here on, "
            "the first with shapes %s",
            self.kind.__name__,
            self.settings.most_graphs,
            shapes,
        )


class Compiled:
    """A runner that compiles blocks and runs them through another runner. Offloaded blocks run uncompiled."""

    def __init__(self, runner: BlockRunner, settings: CompileSettings) -> None:
        self.runner = runner
        self.settings = settings
        self.blocks: dict[nn.Module, nn.Module] = {}
        self.begun_kinds: set[type] = set()
        self.warned_kinds: set[type] = set()

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        runnable = self.blocks.get(block)
        if runnable is None:
            runnable = (
                block
                if is_offloaded(block)
                else CompiledBlock(block, self.settings, self.begun_kinds, self.warned_kinds)
            )
            self.blocks[block] = runnable
        return self.runner(runnable, *inputs, **named)


def is_offloaded(block: nn.Module) -> bool:
    """Return True if a block's weights arrive through a ring while it computes, where compiled code reads too early."""
    return any(isinstance(layer.handle, OffloadedHandle | ShardedHandle) for layer in frozen_layers(block))
