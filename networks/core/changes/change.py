"""The interface of a change of one weight: to the trainer, which runs layers with it, and to tools, which merge it.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from library.errors import UserError

Forward = Callable[[Tensor], Tensor]

ModuleTensors = Mapping[str, Tensor]
"""The tensors of one module by the end of their keys."""


@dataclass(frozen=True)
class ChangeSize:
    """How large a change is, and in which structure, for reports and for comparing it with a file."""

    rank: int | None = None  # or the block size, where files tell that; None where they tell neither
    alpha: float = 0.0
    block_sizes: tuple[int, ...] = ()  # of rotations
    has_core: bool = False
    has_scalar: bool = False
    is_whole: bool = False  # no factor has a rank
    magnitudes: Literal["", "input", "output"] = ""  # of DoRA: what there is one of for each

    @property
    def has_ranks(self) -> bool:
        """True if it lies between two factors, and alpha belongs to it."""
        return self.rank is not None and not self.block_sizes


class Change(Protocol):
    """The change of one layer. Implementations are modules whose parameters are named as in files.

    It is called `forward` and not `apply`, since every `nn.Module` has an `apply` that means something else.
    """

    @property
    def fast_keys(self) -> frozenset[str]:
        """The parameters that LoRA+ trains faster."""
        ...

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        """The parameters of the layer that it changes: "weight", for norms "bias" too."""
        ...

    @property
    def adds_to_output(self) -> bool:
        """True if it takes the layer's input as it is and adds to what the layer gives."""
        ...

    @property
    def size(self) -> ChangeSize: ...

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Run the layer with `strength` times the change; `base` is the layer without it."""
        ...

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        """Return `base`, a parameter of the layer, so that the layer computes the same without the change.

        Computed in the wider dtype of `base` and the change. Raises `Misfit` where they differ in size.
        """
        ...

    def norm(self) -> Tensor:
        """Return the Frobenius norm of the change at strength 1, before magnitudes."""
        ...

    def scale_(self, ratio: Tensor) -> None:
        """Multiply the change by a number."""
        ...

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors as files have them."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors that `stored_tensors` gave, or that another program wrote. What is missing keeps its start.

        A trained strength becomes 1, as the file has it in its factors.
        """
        ...


@runtime_checkable
class Stackable(Protocol):
    """A change that can be computed with those of other adapters of the same layer, in one product."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        ...

    @property
    def layer(self) -> nn.Module | None: ...

    @property
    def is_pair(self) -> bool:
        """True if nothing acts but two factors, and numbers for columns."""
        ...

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (down, up) as the next call multiplies them, or their kernels."""
        ...

    def columns(self) -> Tensor | None:
        """Return what the columns of the changed weight are multiplied by, (1, I) or (1, I, 1, 1); None for nothing."""
        ...


@runtime_checkable
class FollowsGradients(Protocol):
    """A change that looks at the gradients of every optimizer step."""

    def note_gradients(self) -> None:
        """Look at the gradients, which are complete and not clipped yet."""
        ...


@runtime_checkable
class Converted(Protocol):
    """A change that brings the tensors of a file to the form that it has in memory."""

    def in_memory(self, tensors: ModuleTensors, name: str, source: str) -> ModuleTensors:
        """Return the tensors of the module `name`. Raises UserError naming the file `source` where it cannot."""
        ...


class Misfit(UserError):
    """A change meets a weight of another size."""

    def __init__(self, key: str, change: tuple[int, ...], base: tuple[int, ...]) -> None:
        super().__init__(f"{key or 'a change'} of the shape {list(change)} meets a weight of {list(base)}")
        self.key, self.change, self.base = key, change, base


class Delta(Protocol):
    """dW in fewer numbers, without alpha and magnitudes: what tells one additive kind from another.

    dW is linear in each of the parameters, whose names, those of child modules included, are the names in files. The
    caller scales the channels that lie between `down` and `up`, and drops some of them.
    """

    rank: int
    has_core: bool  # a Tucker core, as use_tucker asks for
    is_whole: bool  # no factor has a rank: alpha does not count
    fast_key: str  # LoRA+ trains it faster, and a trained strength is multiplied into it in files

    def start_moving(self) -> None:
        """Draw what starts at zero: a trained strength of 0 holds the change at zero instead (use_scalar)."""
        ...

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x in few channels: on the last axis for a Linear, on axis 1 for a convolution.

        With `columns` (1, I) or (1, I, 1, 1) channel i of x is multiplied by column i first.
        """
        ...

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        """Return `base` plus what the channels add to it, in the dtype of `base`."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN) of which dW is the product."""
        ...

    def weight(self) -> Tensor:
        """dW in the shape of the layer's weight."""
        ...


class MergedOnly(nn.Module):
    """The common part of changes that are read from files and merged, but not trained: their tensors are buffers."""

    words: str  # what a reader knows it by
    changed_parameters: tuple[str, ...] = ("weight",)
    fast_keys: frozenset[str] = frozenset()
    adds_to_output = False
    size = ChangeSize()

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        raise UserError(f"{self.words} can be merged, but not trained; merge it with tools/merge_lora.py")

    def stored_tensors(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, tensors: ModuleTensors) -> None:
        self.load_state_dict(dict(tensors))


@runtime_checkable
class StoredOtherwise(Protocol):
    """A delta whose tensors in memory are others than those that files have."""

    def as_one(self, tensors: ModuleTensors) -> dict[str, Tensor]:
        """Return the tensors in memory, alpha included, as files have them."""
        ...

    def apart(self, tensors: ModuleTensors, name: str, source: str) -> dict[str, Tensor]:
        """Return the tensors of a file as they are in memory.

        Raises UserError naming the module `name` and the file `source`, and what to do, where that cannot be.
        """
        ...


@runtime_checkable
class Paired(Protocol):
    """A delta that is the product of two factors, and multiplies by nothing else."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (down, up) as the next call multiplies them: (R, I) and (O, R), or their kernels."""
        ...


@runtime_checkable
class HasDelta(Protocol):
    """A change that is made of a delta."""

    @property
    def delta(self) -> Delta: ...


def delta_of(change: Change) -> Delta | None:
    """Return the delta that a change is made of; None for changes of another sort."""
    return change.delta if isinstance(change, HasDelta) else None


MakeDelta = Callable[[nn.Module, int], Delta]
"""(the layer, its rank) -> fresh numbers for the change of its weight."""


def list_parts(delta: Delta) -> dict[str, Tensor]:
    """Return every tensor that dW is made of, by name: all parameters and buffers of the delta."""
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
    """x as a factor can meet it: autocast casts for itself, without it x gets the factor's dtype here."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


def stand_in(shape: tuple[int, ...]) -> nn.Module:
    """Make a layer on the meta device with a weight of shape (O, I) or (O, I, h, w), where there is only a file."""
    num_outputs, num_inputs, *kernel = shape
    with torch.device("meta"):
        if not kernel:
            return nn.Linear(num_inputs, num_outputs, bias=False)
        return nn.Conv2d(num_inputs, num_outputs, (kernel[0], kernel[1]), bias=False)


def fill(delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a delta on the meta device the tensors of a file, in the dtypes they have there."""
    own, given = delta.state_dict(), {}
    for name, tensor in own.items():
        found = match_shape(tensors[name], tensor) if name in tensors else None
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else list(found.shape)
            raise UserError(f"{name} is {shape}, but {list(tensor.shape)} fits the rest")
        given[name] = found
    delta.load_state_dict(given, assign=True)
    delta.requires_grad_(False)


def match_shape(found: Tensor, own: Tensor) -> Tensor:
    """Return a tensor of a file in the shape of `own` if the two differ only in how a kernel is written.

    A matrix stands for a convolution, of which some programs keep no kernel, and a 1x1 kernel for a Linear layer, which
    other checkpoints have where this has the one; anything else comes back as it is.
    """
    if found.shape == own.shape or found.dim() < 2 or own.dim() < 2:
        return found
    has_same_rows = found.shape[0] == own.shape[0] and found.numel() == own.numel()
    return found.reshape(own.shape) if has_same_rows and 2 in (found.dim(), own.dim()) else found


def check_kernel(layer: nn.Module) -> nn.Module:
    """Return the layer. Raises UserError for a convolution that cannot be adapted."""
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise UserError(
            f"a convolution with groups={layer.groups} and padding_mode={layer.padding_mode!r} cannot be adapted; "
            "give its block the rank 0"
        )
    return layer
