"""Temporary evaluation mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode inside the block, and restore each part's previous mode afterwards."""
    roots = list(modules)
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            # `train(mode)` would set the children too.
            module.training = mode
