"""A stand-in device without float64, like Apple's GPUs: it computes on the CPU and refuses float64 tensors.

Its tensors report the device `DEVICE`. Code that moves tensors, creates them on another tensor's device, or mixes
devices therefore behaves as on a GPU: float64 is refused, and values reach the CPU only by a copy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cpu", 1)  # torch itself never puts a tensor there
REFUSED = (torch.float64, torch.complex128)


class OnDevice(Tensor):
    """A tensor on the stand-in device; `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        if inner.dtype in REFUSED:
            raise TypeError(f"the device has no {inner.dtype}")
        wrapper: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor on the device has no numpy array; copy it to the CPU first")


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; results are on the device if an argument is, or if `device` requests it.

    Raises TypeError for tensors of both devices, unless one is a scalar or the operation is a copy.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    stays = bool(here)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif here and any(t.dim() and not isinstance(t, OnDevice) for t in tensors) and "copy_" not in str(func):
        raise TypeError(f"{func} got tensors of both devices")
    results = func(*unwrap(args), **unwrap(kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not stays:
        return results
    known_tensors = {id(tensor.inner): tensor for tensor in here}  # in-place operations return their own argument
    return tree_map_only(Tensor, lambda t: known_tensors[id(t)] if id(t) in known_tensors else OnDevice(t), results)


def unwrap(values: Any) -> Any:
    return tree_map_only(OnDevice, lambda tensor: tensor.inner, values)


class Factories(TorchDispatchMode):
    """A mode that creates tensors on the stand-in device if they are requested there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """A mode that creates tensors from Python numbers on the stand-in device; torch fills these before any dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, "device": DEVICE, **kwargs})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(kwargs["device"])
        return func(*args, **kwargs)


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Yield the device, which exists inside the block."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # otherwise modules would extract the inner values
    try:
        with Factories(), FromNumbers():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
