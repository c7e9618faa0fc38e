"""Finds where the host would wait for a card, without one: models of fake tensors on a device that is not the host.

Fake tensors have no values, so whatever asks for one raises: `.item()`, `.tolist()`, an `if`, a shape that depends on
values. Their mode is not on, so the host draws and counts with tensors of its own as ever. Copies between the two pass
for fakes, so `NoWaiting` looks at them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device_standin import DEVICE, OnDevice

OURS = ("networks.core.kinds", "networks.core.changes")  # what adapters are made of, beside modules


class HostWaits(Exception):
    """The host would wait until the device has done all it was given."""


class NoWaiting(TorchDispatchMode):
    """Raises HostWaits for every copy between host and device that the host waits for.

    That is any copy to the host, and one to the device that is not `non_blocking`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            there = [isinstance(tensor, OnDevice) for tensor in given]
            target = kwargs.get("device") or given[0].device
            goes, comes = torch.device(target) == DEVICE, there[-1]
            no_wait = kwargs.get("non_blocking", False) or args[-1] is True
            if goes != comes and not (goes and no_wait):
                raise HostWaits(f"a copy of {tuple(given[-1].shape)} to {target}")
        return func(*args, **kwargs)


def move_fakes(models: Iterable[nn.Module]) -> None:
    """Put the fake tensors of models, and of whatever of ours they hold, on the device; shared ones stay shared.

    Frozen values that are computed from weights are moved with them here, as a run moves them in its first step.
    """
    made: dict[Tensor, Tensor] = {}
    seen: set[int] = set()
    waiting: list[Any] = [module for model in models for module in model.modules()]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        parts = [vars(held), *([held._parameters, held._buffers] if isinstance(held, nn.Module) else [])]
        for part in parts:
            for name, old in part.items():
                if isinstance(old, FakeTensor):
                    made[old] = made.get(old, on_device(old))
                    part[name] = made[old]
                elif isinstance(old, nn.Module) or type(old).__module__.startswith(OURS):
                    waiting.append(old)


def on_device(old: Tensor) -> Tensor:
    """A tensor or parameter on the device."""
    moved = OnDevice(old.detach())
    return nn.Parameter(moved, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else moved
