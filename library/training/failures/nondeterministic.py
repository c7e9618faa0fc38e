"""Locates the module whose operation has no deterministic form, by recomputing a batch with hooks on every module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from library.base.determinism import NO_FIXED_ORDER
from library.training.failures.nonfinite_trace import list_models
from library.training.run_parts import Run
from library.training.step.losses import loss_of, start_batch
from library.training.step.pairs import split_passes
from library.types import Batch

CLAIMED = "module is noted"  # key in the metadata of autograd's nodes


@dataclass
class Position:
    """The module that computes its forward or backward pass; None outside of all modules."""

    module: str | None = None

    def set(self, module: str | None, _: Any = None) -> None:
        self.module = module


def find_nondeterministic_module(run: Run, batch: Batch, batch_number: int, step: int) -> str | None:
    """Recompute a batch whose pass raised the error. Return the module that raises it, or None if that is unknown.

    The gradients are not usable afterwards.
    """
    position = Position()
    try:
        with follow_modules(list_models(run), position):
            for pass_batch in split_passes(run.context, batch):
                start_batch(run.context, batch_number, step)
                torch.autograd.backward(loss_of(run.context, pass_batch, batch_number))
    except RuntimeError as error:  # the same, or a lack of memory, as the first attempt's graph still exists
        return position.module if NO_FIXED_ORDER.search(str(error)) else None
    return None


@contextmanager
def follow_modules(parts: Mapping[str, nn.Module], position: Position) -> Iterator[None]:
    """Keep `position` up to date while the modules compute inside the block."""
    outer: list[str | None] = []

    def enter(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        claim((args, kwargs), position.module)  # computed by the module that calls this one
        outer.append(position.module)
        position.set(name)

    def leave(name: str, _: nn.Module, args: Any, output: Any) -> None:
        claim(output, name)
        position.set(outer.pop())

    def claim(values: Any, name: str | None) -> None:
        """Note the module of the last operation behind each tensor; those before it follow in the backward pass."""
        for tensor in tree_leaves(values):
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            # An inner module has claimed what its caller returns unchanged.
            if node is not None and CLAIMED not in node.metadata:
                node.metadata[CLAIMED] = True
                node.register_prehook(partial(position.set, name))

    handles: list[Any] = []
    for part, root in parts.items():
        for name, module in root.named_modules():
            full_name = f"{part}.{name}" if name else part
            handles.append(module.register_forward_pre_hook(partial(enter, full_name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(leave, full_name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
