"""Detection of code where the host would wait for a GPU, without a GPU: models of fake tensors on a stand-in device.

Fake tensors have no values, so anything that needs a value raises: `.item()`, `.tolist()`, an `if`, a shape that
depends on values. The fake tensor mode is off, so the host's own tensors are real. Copies between host and device
succeed with fake tensors, so `NoWaiting` checks them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device_standin import DEVICE, OnDevice

OURS = ("networks.core.kinds", "networks.core.changes")  # contents of adapters that are not modules


class HostWaits(Exception):
    """Raised where the host would wait for the device to finish its queue."""


class NoWaiting(TorchDispatchMode):
    """A mode that raises HostWaits for every copy between host and device that blocks the host.

    These are all copies to the host, and copies to the device that are not `non_blocking`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            there = [isinstance(tensor, OnDevice) for tensor in tensors]
            target = kwargs.get("device") or tensors[0].device
            goes, comes = torch.device(target) == DEVICE, there[-1]
            no_wait = kwargs.get("non_blocking", False) or args[-1] is True
            if goes != comes and not (goes and no_wait):
                raise HostWaits(f"a copy of {tuple(tensors[-1].shape)} to {target}")
        return func(*args, **kwargs)


def move_fakes(models: Iterable[nn.Module]) -> None:
    """Move the fake tensors of models, and of our own objects inside them, to the device; shared tensors stay shared.

    This includes frozen values computed from weights, which a run moves in its first step.
    """
    moved: dict[Tensor, Tensor] = {}
    visited: set[int] = set()
    waiting: list[Any] = [module for model in models for module in model.modules()]
    while waiting:
        held = waiting.pop()
        if id(held) in visited:
            continue
        visited.add(id(held))
        parts = [vars(held), *([held._parameters, held._buffers] if isinstance(held, nn.Module) else [])]
        for part in parts:
            for name, old in part.items():
                if isinstance(old, FakeTensor):
                    moved[old] = moved.get(old, on_device(old))
                    part[name] = moved[old]
                elif isinstance(old, nn.Module) or type(old).__module__.startswith(OURS):
                    waiting.append(old)


def on_device(old: Tensor) -> Tensor:
    """Return a tensor or parameter on the device."""
    moved = OnDevice(old.detach())
    return nn.Parameter(moved, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else moved
