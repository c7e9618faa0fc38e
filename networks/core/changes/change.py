"""Interface of the change of one layer. The trainer runs layers with it, tools merge it.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from library.base.errors import UserError

Forward = Callable[[Tensor], Tensor]

ModuleTensors = Mapping[str, Tensor]
"""Tensors of one module by parameter key, the end of their keys in files."""


@dataclass(frozen=True)
class ChangeSize:
    """Size and structure of a change, for reports and for comparison with a file."""

    rank: int | None = None  # or the block size of a rotation; None if neither applies
    alpha: float = 0.0
    block_sizes: tuple[int, ...] = ()  # of rotations
    has_core: bool = False
    has_scalar: bool = False
    is_whole: bool = False  # no factor has a rank
    magnitudes: Literal["", "input", "output"] = ""  # DoRA: one magnitude per input or per output

    @property
    def has_ranks(self) -> bool:
        """True if the change has factors with a rank, to which alpha applies; False for rotations and norms."""
        return self.rank is not None and not self.block_sizes


class Change(Protocol):
    """The change of one layer. Implementations are modules with parameters named as in files.

    The method is called `forward` because `nn.Module.apply` has another meaning.
    """

    @property
    def fast_keys(self) -> frozenset[str]:
        """Parameters that LoRA+ trains with a higher learning rate."""
        ...

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        """Names of the layer's parameters that it changes: "weight", "bias" or both."""
        ...

    @property
    def size(self) -> ChangeSize: ...

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Run the layer with `strength` times the change; `base` runs the layer without it."""
        ...

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        """Return `base`, a parameter of the layer, with the change merged in.

        The result has the wider dtype of `base` and the change. Raises `Misfit` if their sizes differ.
        """
        ...

    def norm(self) -> Tensor:
        """Return the Frobenius norm of the change at strength 1, before magnitudes."""
        ...

    def scale_(self, ratio: Tensor) -> None:
        """Multiply the change by `ratio`."""
        ...

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors as stored in files."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors from `stored_tensors` or from another program, which may lack optional ones.

        A trained strength becomes 1, since files have it multiplied into a factor.
        """
        ...


@runtime_checkable
class FollowsGradients(Protocol):
    """A change that uses the gradients of every optimizer step."""

    def note_gradients(self) -> None:
        """Read the gradients of an optimizer step, which are complete and not clipped yet."""
        ...


@runtime_checkable
class Converted(Protocol):
    """A change that converts a file's tensors to their form in memory."""

    def in_memory(self, tensors: ModuleTensors, name: str, source: str) -> ModuleTensors:
        """Return the tensors of module `name` as they are in memory. Raises UserError naming the file `source`."""
        ...


class Misfit(UserError):
    """Error for a change whose size differs from that of the weight."""

    def __init__(self, key: str, change: tuple[int, ...], base: tuple[int, ...]) -> None:
        super().__init__(f"{key or 'a change'} of the shape {list(change)} meets a weight of {list(base)}")
        self.key, self.change, self.base = key, change, base


class Delta(Protocol):
    """dW of an additive kind, without alpha and magnitudes.

    dW is linear in each parameter. Parameter names, including those of child modules, are the names in files. The
    caller scales the channels between `down` and `up` and applies dropout to them.
    """

    rank: int
    has_core: bool  # has a Tucker core (use_tucker)
    is_whole: bool  # no factor has a rank, so alpha has no effect
    fast_key: str  # trained faster by LoRA+; takes the trained strength in files

    def start_moving(self) -> None:
        """Draw the parameters that start at zero. A trained strength of 0 keeps the change at zero (use_scalar)."""
        ...

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """Project x to the R channels: on the last axis for a Linear, on axis 1 for a convolution.

        `columns` (1, I) or (1, I, 1, 1) scales the channels of x first.
        """
        ...

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        """Project the channels to the outputs and add them to `base`, in the dtype of `base`."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN) with dW = up @ down."""
        ...

    def weight(self) -> Tensor:
        """Return dW in the shape of the layer's weight."""
        ...


class MergedOnly(nn.Module):
    """Base class of changes that are read from files and merged, but not trained. Their tensors are buffers."""

    words: str  # name in messages
    changed_parameters: tuple[str, ...] = ("weight",)
    fast_keys: frozenset[str] = frozenset()
    size = ChangeSize()

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        raise UserError(f"{self.words} can be merged, but not trained", "merge it with tools/merge_lora.py")

    def stored_tensors(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, tensors: ModuleTensors) -> None:
        self.load_state_dict(dict(tensors))


@runtime_checkable
class StoredOtherwise(Protocol):
    """A delta with different tensors in memory and in files."""

    def as_one(self, tensors: ModuleTensors) -> dict[str, Tensor]:
        """Return the tensors in memory, including alpha, as stored in files."""
        ...

    def apart(self, tensors: ModuleTensors, name: str, source: str) -> dict[str, Tensor]:
        """Return a file's tensors as they are in memory.

        Raises UserError naming the module `name`, the file `source` and a fix if that is impossible.
        """
        ...


@runtime_checkable
class HasDelta(Protocol):
    """A change that contains a delta."""

    @property
    def delta(self) -> Delta: ...


def delta_of(change: Change) -> Delta | None:
    return change.delta if isinstance(change, HasDelta) else None


MakeDelta = Callable[[nn.Module, int], Delta]
"""(layer, rank) -> a new delta for the layer's weight."""


def list_parts(delta: Delta) -> dict[str, Tensor]:
    """Return all parameters and buffers of a delta by name, including those of its children."""
    assert isinstance(delta, nn.Module)
    return {**dict(delta.named_parameters()), **dict(delta.named_buffers())}


def get_weight(module: nn.Module) -> Tensor:
    """Return the weight of a layer or of a factor, as the tensor that it is."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return (O, I) or (O, I, h, w) without touching the weight, which a layer in another format would decode."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features)


def match_dtype(factor: Tensor, x: Tensor) -> Tensor:
    """Cast x to the factor's dtype, unless autocast does it."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


@torch.no_grad()
def change_norms(change: Change, base: Tensor) -> tuple[float, float]:
    """Return the Frobenius norms (of what the change adds to a layer's weight `base`, of `base`) at strength 1."""
    # In float32: bf16 would round a small change away.
    base = base.detach().float()
    return float((change.merged(base).float() - base).norm()), float(base.norm())


def stand_in(shape: tuple[int, ...]) -> nn.Module:
    """Return a layer on the meta device with a weight of `shape`, (O, I) or (O, I, h, w), for files read alone."""
    num_outputs, num_inputs, *kernel = shape
    with torch.device("meta"):
        if not kernel:
            return nn.Linear(num_inputs, num_outputs, bias=False)
        return nn.Conv2d(num_inputs, num_outputs, (kernel[0], kernel[1]), bias=False)


def fill(delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Assign a file's tensors, in their dtypes, to a delta on the meta device, and freeze it.

    Raises UserError if a tensor is missing or has another shape.
    """
    expected, loaded = delta.state_dict(), {}
    for name, like in expected.items():
        matched = match_shape(tensors[name], like) if name in tensors else None
        if matched is None or matched.shape != like.shape:
            shape = "missing" if matched is None else list(matched.shape)
            raise UserError(f"{name} is {shape}, but {list(like.shape)} fits the rest")
        loaded[name] = matched
    # Assigned, because a parameter on the meta device has no memory to copy into and a copy would cast to its dtype.
    delta.load_state_dict(loaded, assign=True)
    delta.requires_grad_(False)


def match_shape(tensor: Tensor, like: Tensor) -> Tensor:
    """Reshape a file's tensor to the shape of `like`, if the two differ only in how a kernel is written.

    Some programs store a convolution as a matrix, without its kernel. Some checkpoints have a 1x1 convolution in place
    of a Linear layer. Other tensors are returned unchanged.
    """
    if tensor.shape == like.shape or tensor.dim() < 2 or like.dim() < 2:
        return tensor
    # Only a matrix and a kernel are two ways to write the same numbers; two kernels of different shapes are not.
    has_same_rows = tensor.shape[0] == like.shape[0] and tensor.numel() == like.numel()
    return tensor.reshape(like.shape) if has_same_rows and 2 in (tensor.dim(), like.dim()) else tensor


def check_kernel(layer: nn.Module) -> nn.Module:
    """Return the layer. Raises UserError for a convolution with groups or with a padding mode other than zeros."""
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise UserError(
            f"a convolution with groups={layer.groups} and padding_mode={layer.padding_mode!r} cannot be adapted",
            "give its block the rank 0",
        )
    return layer
