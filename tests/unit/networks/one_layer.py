"""A single adapted layer, without a network around it."""

from typing import Any

from torch import nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Delta
from networks.core.changes.dora import Decompose, DoRA
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.targets.targets import TargetModule, adaptation_kind


def adapter_on(
    layer: nn.Module,
    delta: Delta,
    alpha: float,
    join: Decompose | None = None,
    drops: Dropout = NO_DROPOUT,
    multiplier: float = 1.0,
    has_scalar: bool = False,
) -> Adapter:
    """Return an adapter of a layer named x that is not installed yet."""
    kind = adaptation_kind(layer)
    assert kind is not None
    common = (drops, has_scalar)
    change = ScaledDelta(layer, delta, alpha, *common) if join is None else DoRA(layer, delta, alpha, join, *common)
    return Adapter(TargetModule("x", "x", layer, kind), change, multiplier)


def module_of(adapter: Adapter) -> Any:
    """Return the adapter's change, whose tensors the tests inspect."""
    assert isinstance(adapter.change, nn.Module)
    return adapter.change


def double(adapter: Adapter) -> Adapter:
    """Return the adapter with its tensors in float64."""
    module_of(adapter).double()
    return adapter
