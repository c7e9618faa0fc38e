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
from library.memory.offload.sharded import Shelved
from library.memory.offload.streamed import Waiting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileSettings:
    """Settings of torch.compile for blocks.

    torch's automatic mode, first a static graph and then a dynamic one, is not offered: both match the first size, and
    a recomputed block might run the other graph, which saves different tensors.
    """

    backend: Any = "inductor"
    mode: str | None = None
    is_dynamic: bool = True  # one graph for all sizes instead of one for each
    needs_full_graph: bool = False
    most_graphs: int = 128  # per kind of block


class CompiledBlock(nn.Module):
    """A block as a runner sees it, compiled at its first call with gradients.

    Without gradients, as in previews and validation, it runs uncompiled: their other sizes would trigger compilations.
    It also does while operations are counted, because torch never retries to compile a frame that it skipped then.
    """

    def __init__(
        self, block: nn.Module, settings: CompileSettings, begun_kinds: set[type], warned_kinds: set[type]
    ) -> None:
        """The sets collect the kinds of blocks for which the start and the end of compiling were already logged."""
        super().__init__()
        self.block = block
        self.settings = settings
        self.begun_kinds, self.warned_kinds = begun_kinds, warned_kinds
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
        _dynamo.config.accumulated_recompile_limit = max(256, 4 * self.settings.most_graphs)
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
        """The class of the block; a library's block is wrapped in a BlockBody."""
        return type(getattr(self.block, "block", self.block))

    def warn_once(self, given: Any) -> None:
        """Warn once per kind of block, with the first input shapes that are no longer compiled."""
        if self.kind in self.warned_kinds:
            return
        self.warned_kinds.add(self.kind)
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(given) if isinstance(t, Tensor) and t.ndim > 1)
        logger.warning(
            "%s was compiled %d times (--compile_cache_size_limit); inputs of new sizes run uncompiled from here on, "
            "the first with shapes %s",
            self.kind.__name__,
            self.settings.most_graphs,
            shapes,
        )


class Compiled:
    """Runs blocks compiled, through another runner; offloaded blocks run uncompiled."""

    def __init__(self, runner: BlockRunner, settings: CompileSettings) -> None:
        self.runner = runner
        self.settings = settings
        self.blocks: dict[nn.Module, nn.Module] = {}
        self.begun_kinds: set[type] = set()
        self.warned_kinds: set[type] = set()

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        found = self.blocks.get(block)
        if found is None:
            found = (
                block
                if is_offloaded(block)
                else CompiledBlock(block, self.settings, self.begun_kinds, self.warned_kinds)
            )
            self.blocks[block] = found
        return self.runner(found, *inputs, **named)


def is_offloaded(block: nn.Module) -> bool:
    """Return True if a ring delivers weights while the block computes: compiled code would read them too early."""
    return any(isinstance(layer.handle, Waiting | Shelved) for layer in frozen_layers(block))
