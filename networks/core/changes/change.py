"""What a change of one weight offers to the trainer, which runs layers with it, and to tools, which merge it.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from library.errors import UserError

Forward = Callable[[Tensor], Tensor]

Leaves = Mapping[str, Tensor]
"""The tensors of one module by the end of their keys."""


class Change(Protocol):
    """The change of one layer. Implementations are modules whose parameters are named as in files.

    It is called `forward` and not `apply`, since every `nn.Module` has an `apply` that means something else.
    """

    @property
    def fast_leaf(self) -> str:
        """The parameter that LoRA+ trains faster, "" where there is none."""
        ...

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        """Which parameters of the layer it changes: "weight", for norms "bias" too."""
        ...

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """What the layer computes with `strength` times the change; `base` is the layer without it."""
        ...

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        """`base`, a parameter of the layer, so that it computes the same without the change.

        Computed in the wider dtype of `base` and the change. Raises `Misfit` where they differ in size.
        """
        ...

    def norm(self) -> Tensor:
        """The Frobenius norm of the change at strength 1, before magnitudes."""
        ...

    def scale_(self, ratio: Tensor) -> None:
        """Multiply the change by a number."""
        ...

    def leaves(self) -> Mapping[str, Tensor]:
        """The tensors by the end of their keys in files."""
        ...

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Take over tensors that `leaves` gave, or that another program wrote. What is missing keeps its start."""
        ...


class AdditiveChange(Change, Protocol):
    """W0 + weight(), before magnitudes. A rotation of W0 has no such weight."""

    def weight(self) -> Tensor:
        """What is added to the layer's weight at strength 1, in its shape and in the dtype of the change."""
        ...


class LowRankChange(AdditiveChange, Protocol):
    """scale * up @ down."""

    @property
    def scale(self) -> float: ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up_OR, down_RN): norms of DoRA, resizing and joining work on these and never build the weight."""
        ...


class Misfit(UserError):
    """A change meets a weight of another size."""

    def __init__(self, leaf: str, change: tuple[int, ...], base: tuple[int, ...]) -> None:
        super().__init__(f"{leaf or 'a change'} of the shape {list(change)} meets a weight of {list(base)}")
        self.leaf, self.change, self.base = leaf, change, base


class Delta(Protocol):
    """dW in fewer numbers, without alpha and magnitudes: what tells one additive kind from another.

    dW is linear in each of the parameters, whose names, those of child modules included, are the names in files. The
    caller scales the channels that lie between `down` and `up`, and drops some of them.
    """

    rank: int
    has_core: bool  # a Tucker core, as use_tucker asks for
    is_whole: bool  # no factor has a rank: alpha does not count
    fast_leaf: str  # LoRA+ trains it faster, and a trained strength is multiplied into it in files

    def start_moving(self) -> None:
        """Draw what starts at zero: a trained strength of 0 holds the change at zero instead (use_scalar)."""
        ...

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x in few channels: on the last axis for a Linear, on axis 1 for a convolution.

        With `columns` (1, I) or (1, I, 1, 1) channel i of x is multiplied by column i first.
        """
        ...

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        """`base` plus what the channels add to it, in the dtype of `base`."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up_OR, down_RN) of which dW is the product."""
        ...

    def weight(self) -> Tensor:
        """dW in the shape of the layer's weight."""
        ...


class MergedOnly(nn.Module):
    """What the changes share that are read from files and merged, but not trained: their tensors are buffers."""

    words: str  # what a reader knows it by
    changed_parameters = ("weight",)
    fast_leaf = ""

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        raise UserError(f"{self.words} of LyCORIS can be merged, but not trained; merge it with tools/merge_lora.py")

    def leaves(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, leaves: Leaves) -> None:
        self.load_state_dict(dict(leaves))


@runtime_checkable
class StoredOtherwise(Protocol):
    """A delta whose tensors in memory are others than those that files have."""

    def as_one(self, leaves: Leaves) -> dict[str, Tensor]:
        """The leaves in memory, alpha included, as files have them."""
        ...

    def apart(self, leaves: Leaves) -> dict[str, Tensor] | None:
        """The leaves of a file as they are in memory; None where that cannot be."""
        ...

    def refusal(self, name: str, rank: int, source: str) -> str:
        """What to tell the user of a module `name` in a file that cannot be taken over, and the way out."""
        ...


MakeDelta = Callable[[nn.Module, int], Delta]
"""(the layer, its rank) -> fresh numbers for the change of its weight."""


def parts_of(delta: Delta) -> dict[str, Tensor]:
    """Every tensor that dW is made of, by name: parameters of the delta, and parameters and buffers of its children."""
    assert isinstance(delta, nn.Module)
    return {**dict(delta.named_parameters()), **dict(delta.named_buffers())}


def factor(module: nn.Module) -> Tensor:
    """The weight of a child module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def in_dtype_of(factor: Tensor, x: Tensor) -> Tensor:
    """x as a factor can meet it: autocast casts for itself, without it x gets the factor's dtype here."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor.dtype)


def stand_in(shape: tuple[int, ...]) -> nn.Module:
    """A layer with a weight of this shape, (O, I) or (O, I, h, w), where only a file is there; on the meta device."""
    num_outputs, num_inputs, *kernel = shape
    with torch.device("meta"):
        if not kernel:
            return nn.Linear(num_inputs, num_outputs, bias=False)
        return nn.Conv2d(num_inputs, num_outputs, (kernel[0], kernel[1]), bias=False)


def fill(delta: nn.Module, leaves: Mapping[str, Tensor]) -> None:
    """Give a delta on the meta device the tensors of a file, in the dtypes they have there."""
    own, given = delta.state_dict(), {}
    for name, tensor in own.items():
        found = in_shape_of(leaves[name], tensor) if name in leaves else None
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else list(found.shape)
            raise UserError(f"{name} is {shape}, but {list(tensor.shape)} fits the rest")
        given[name] = found
    delta.load_state_dict(given, assign=True)
    delta.requires_grad_(False)


def in_shape_of(found: Tensor, own: Tensor) -> Tensor:
    """A tensor of a file in the shape that it has here, where the two differ in how a kernel is written alone.

    A matrix stands for a convolution, of which some programs keep no kernel, and a 1x1 kernel for a Linear layer, which
    other checkpoints have where this has the one; anything else comes back as it is.
    """
    if found.shape == own.shape or found.dim() < 2 or own.dim() < 2:
        return found
    has_same_rows = found.shape[0] == own.shape[0] and found.numel() == own.numel()
    return found.reshape(own.shape) if has_same_rows and 2 in (found.dim(), own.dim()) else found


def check_kernel(layer: nn.Module) -> nn.Module:
    """The layer. Raises UserError for a convolution that cannot be adapted."""
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        raise UserError(
            f"a convolution with groups={layer.groups} and padding_mode={layer.padding_mode!r} cannot be adapted; "
            "give its block the rank 0"
        )
    return layer
