"""A device that has no float64, as Apple's graphics cards have none: it computes on the CPU and refuses such tensors.

Tensors on it report the device `DEVICE`, so code that moves tensors, makes them on the device of others, or mixes two
devices meets what it would meet on a card: float64 is refused, and values come back to the CPU only by a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cpu", 1)  # no tensor of torch's own is ever there
REFUSED = (torch.float64, torch.complex128)


class OnDevice(Tensor):
    """A tensor on the stand-in; `inner` has the values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype in REFUSED:
            raise TypeError(f"the device has no {inner.dtype}")
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on the device has no numpy array; copy it to the CPU first")


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; its results are on the device where its tensors are, or where it is told to make them.

    Raises TypeError where tensors of both devices meet, unless one is a single number or the operation is a copy.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    stays = bool(here)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif here and any(t.dim() and not isinstance(t, OnDevice) for t in tensors) and "copy_" not in str(func):
        raise TypeError(f"{func} got tensors of both devices")
    results = func(*unwrapped(args), **unwrapped(kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not stays:
        return results
    known = {id(tensor.inner): tensor for tensor in here}  # an operation in place gives its own argument back
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OnDevice(t), results)


def unwrapped(values: Any) -> Any:
    return tree_map_only(OnDevice, lambda tensor: tensor.inner, values)


class Factories(TorchDispatchMode):
    """Makes tensors on the stand-in where its device is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """Makes tensors of Python's numbers on the stand-in: torch fills these before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, "device": DEVICE, **kwargs})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """The device, usable within the block."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # else modules would take the values out of it
    try:
        with Factories(), FromNumbers():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
