"""Blocks whose arithmetic is compiled (torch.compile), each kind of block once however many there are."""

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
    """How blocks are compiled, in torch.compile's own terms.

    What torch calls automatic, a graph of one size and then one of all, is not to be had: both fit the first size, and
    a block that is computed again might get the other one, which keeps other tensors.
    """

    backend: Any = "inductor"
    mode: str | None = None
    is_dynamic: bool = True  # whether a graph serves all sizes, or each has its own
    needs_full_graph: bool = False
    most_graphs: int = 128  # of one kind of block


class CompiledBlock(nn.Module):
    """A block as a runner sees it, compiled when it is first called for gradients.

    Without gradients, as in previews and validation, it runs as it is: their other sizes would be compiled too. So it
    does while operations are counted, for torch never again compiles what it met then.
    """

    def __init__(self, block: nn.Module, settings: CompileSettings, told: set[type]) -> None:
        """`told` are the kinds of blocks that have been warned of."""
        super().__init__()
        self.block = block
        self.settings = settings
        self.told = told
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

        # Each thread has settings of its own, and blocks are computed again in autograd's.
        _dynamo.config.recompile_limit = self.settings.most_graphs
        _dynamo.config.accumulated_recompile_limit = max(256, 4 * self.settings.most_graphs)
        _dynamo.config.fail_on_recompile_limit_hit = True
        try:
            return self.run(*inputs, **named)
        except _dynamo.exc.FailOnRecompileLimitHit:
            if self.settings.needs_full_graph:
                raise
            self.tell((inputs, named))
        return self.block(*inputs, **named)

    def tell(self, given: Any) -> None:
        """Warn, once for each kind of block, of the first inputs that it is not compiled for any more."""
        kind = type(getattr(self.block, "block", self.block))  # of a library's block, the block in its body
        if kind in self.told:
            return
        self.told.add(kind)
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(given) if isinstance(t, Tensor) and t.ndim > 1)
        logger.warning(
            "%s has been compiled %d times, --compile_cache_size_limit: what comes with new sizes runs uncompiled from "
            "here on, the first with %s",
            kind.__name__,
            self.settings.most_graphs,
            shapes,
        )


class Compiled:
    """Runs compiled blocks as another runner runs blocks; those whose weights wait in main memory as they are."""

    def __init__(self, runner: BlockRunner, settings: CompileSettings) -> None:
        self.runner = runner
        self.settings = settings
        self.blocks: dict[nn.Module, nn.Module] = {}
        self.told: set[type] = set()

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        found = self.blocks.get(block)
        if found is None:
            found = block if waits(block) else CompiledBlock(block, self.settings, self.told)
            self.blocks[block] = found
        return self.runner(found, *inputs, **named)


def waits(block: nn.Module) -> bool:
    """Whether weights of a block come through a ring while it computes; compiled code would read them too early."""
    return any(isinstance(layer.handle, Waiting | Shelved) for layer in frozen_layers(block))
