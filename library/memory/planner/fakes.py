"""Models with fake tensors, made from models on the meta device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NORMS = ("group_norm", "layer_norm", "rms_norm")  # norms that autocast computes in float32 on GPUs, but not on CPUs


def give_fakes(model: nn.Module, dtype: torch.dtype | None = None, is_channels_last: bool = True) -> nn.Module:
    """Replace every parameter and buffer by a fake tensor, in place. An active FakeTensorMode is required.

    Floating-point tensors get `dtype`, or keep theirs if it is None. Weights of convolutions become channels last, as
    on a GPU, unless `is_channels_last` is False. A tensor that several modules share stays shared, also with a module
    that is only an attribute, as the delta of an adapter is.
    """
    tensors = {id(old): old for module in model.modules() for _, old in own_tensors(module)}
    fakes = {key: make_fake(old, dtype, is_channels_last) for key, old in tensors.items()}
    attributes = [value for module in model.modules() for value in vars(module).values()]
    for module in (*model.modules(), *(value for value in attributes if isinstance(value, nn.Module))):
        for name, old in own_tensors(module):
            if id(old) in fakes:
                registry: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
                registry[name] = fakes[id(old)]
    return model


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module alone, by name."""
    named = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in named if tensor is not None]


def make_fake(old: Tensor, dtype: torch.dtype | None, is_channels_last: bool) -> Tensor:
    """Return an empty tensor or parameter of the same shape."""
    layout = torch.channels_last if is_channels_last and old.ndim == 4 else torch.contiguous_format
    new_dtype = dtype if dtype is not None and old.is_floating_point() else old.dtype
    new = torch.empty(old.shape, dtype=new_dtype, memory_format=layout)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def emulate_cuda_norms() -> Iterator[None]:
    """Make CPU autocast compute norms in float32 and return float32 inside the block, as CUDA autocast does, and count
    an RMS norm as one kernel.

    The list of these functions is in ATen/autocast_mode.h.
    """
    # This accounts for 1.5 GiB of a step of SDXL, and for 4 GiB of a step of FLUX.1 without recomputation. torch's own
    # modules and libraries look the functions up at each call. A TorchFunctionMode does not work: it is off while a
    # block is recomputed in the backward pass.
    old = {name: getattr(functional, name) for name in NORMS}
    for name, norm in {**old, "rms_norm": fused_rms_norm}.items():
        setattr(functional, name, run_in_float32(norm))
    try:
        yield
    finally:
        for name, norm in old.items():
            setattr(functional, name, norm)


def run_in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **named: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.float()
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
            named = {name: a.float() if isinstance(a, Tensor) else a for name, a in named.items()}
        return norm(x, *args, **named)

    return run


def fused_rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Compute a layer norm in place of an RMS norm: one kernel that keeps its input, as CUDA's RMS norm (torch 2.9).

    Without a GPU torch computes an RMS norm in six operations. Values differ, but fake tensors have none.
    """
    if weight is not None and weight.dtype != x.dtype:  # CUDA has no single kernel for these either
        return torch.rms_norm(x, list(normalized_shape), weight, eps)
    return torch.layer_norm(x, list(normalized_shape), weight, None, eps or 1e-6)
