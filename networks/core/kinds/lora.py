"""How the change of a weight is stored and applied.

Letters: O output features or channels, I input features or channels, R rank, h w kernel.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class Delta(Protocol):
    """The change of one weight in fewer numbers: x goes down to R channels, then up to the layer's outputs.

    The parameters belong to child modules, whose names are the names in files. Between `down` and `up` the caller
    scales the R channels and drops some of them.
    """

    @property
    def rank(self) -> int: ...

    def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...

    def down(self, x: Tensor) -> Tensor:
        """x in R channels: on the last axis for a Linear, on axis 1 for a convolution."""
        ...

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        """`base` plus what the R channels add to it, in the dtype of `base`."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up_OR, down_RN) of which the change is the product, N = I * h * w."""
        ...

    def weight(self) -> Tensor:
        """The change in the shape of the layer's weight, without alpha and multiplier."""
        ...


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): dW = up @ down.

    `lora_down.weight` is (R, I) or (R, I, h, w) and starts kaiming uniform with a = sqrt(5); `lora_up.weight` is (O, R)
    or (O, R, 1, 1) and starts at zero, so the change starts at zero. Both are float32.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.rank = rank
        if isinstance(layer, nn.Linear):
            self.lora_down: nn.Module = nn.Linear(layer.in_features, rank, bias=False, dtype=torch.float32)
            self.lora_up: nn.Module = nn.Linear(rank, layer.out_features, bias=False, dtype=torch.float32)
        else:
            assert isinstance(layer, nn.Conv2d)
            self.lora_down = narrow_like(layer, rank)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, dtype=torch.float32)
        nn.init.kaiming_uniform_(factor(self.lora_down), a=math.sqrt(5))
        nn.init.zeros_(factor(self.lora_up))

    def down(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.lora_down(in_dtype_of(self.lora_down, x))
        return hidden

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        return add_product(base, hidden, factor(self.lora_up))

    def factors(self) -> tuple[Tensor, Tensor]:
        return factors_of(self)

    def weight(self) -> Tensor:
        up_OR, down_RI = factor(self.lora_up).flatten(1), factor(self.lora_down).flatten(1)
        shape = (up_OR.shape[0], *factor(self.lora_down).shape[1:])
        return (up_OR @ down_RI).reshape(shape)


class Tucker(nn.Module):
    """LoRA of a larger kernel in Tucker form: dW[o,i,h,w] = sum over p and q of up[o,p] mid[p,q,h,w] down[q,i].

    `lora_down.weight` is (R, I, 1, 1), `lora_mid.weight` (R, R, h, w) with the layer's stride and padding,
    `lora_up.weight` (O, R, 1, 1). Down and mid start kaiming uniform with a = sqrt(5), up at zero. All are float32.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(layer, nn.Conv2d)
        self.rank = rank
        self.lora_down = nn.Conv2d(layer.in_channels, rank, 1, bias=False, dtype=torch.float32)
        self.lora_mid = narrow_like(layer, rank, in_channels=rank)
        self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, dtype=torch.float32)
        for module in (self.lora_down, self.lora_mid):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)

    def down(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.lora_mid(self.lora_down(in_dtype_of(self.lora_down, x)))
        return hidden

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        return add_product(base, hidden, self.lora_up.weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return factors_of(self)

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        return (up_OR @ down_RN).reshape(-1, self.lora_down.in_channels, *self.lora_mid.weight.shape[2:])


def factors_of(delta: nn.Module) -> tuple[Tensor, Tensor]:
    """(up_OR, down_RN) of which the change is the product, N = I * h * w; a Tucker core is multiplied into down."""
    children = dict(delta.named_children())
    up_OR, down = factor(children["lora_up"]).flatten(1), factor(children["lora_down"])
    if "lora_mid" in children:
        mid_RRhw = factor(children["lora_mid"])
        return up_OR, torch.einsum("pqhw,qi->pihw", mid_RRhw, down.flatten(1)).flatten(1)
    return up_OR, down.flatten(1)


def down_by_columns(delta: Delta, x: Tensor, columns: Tensor) -> Tensor:
    """What `delta.down` makes of x when input column i is multiplied by `columns` (1, I) or (1, I, 1, 1).

    The factor is scaled in place of x, so that autograd keeps x itself, which others keep too.
    """
    children = dict(delta.named_children())
    layer = children["lora_down"]
    x, weight = in_dtype_of(layer, x), factor(layer) * columns.to(factor(layer).dtype)
    if not isinstance(layer, nn.Conv2d):
        return linear(x, weight)
    hidden = conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return children["lora_mid"](hidden) if "lora_mid" in children else hidden


def narrow_like(layer: nn.Conv2d, rank: int, in_channels: int | None = None) -> nn.Conv2d:
    """A convolution that looks at the same pixels as `layer` and has R output channels, and as many inputs if unset."""
    if layer.groups != 1 or layer.padding_mode != "zeros":
        raise ValueError(
            f"a convolution with groups={layer.groups} and padding_mode={layer.padding_mode!r} cannot be adapted; "
            "give its block the rank 0"
        )
    return nn.Conv2d(
        layer.in_channels if in_channels is None else in_channels,
        rank,
        kernel_size=layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=False,
        dtype=torch.float32,
    )


def add_product(base: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """`base` plus what an up factor of (O, R) or (O, R, 1, 1) makes of the R channels, in the dtype of `base`."""
    if up.dim() == 4:
        return base + conv2d(hidden, up).to(base.dtype)
    if base.dim() > 1 and hidden.dtype == base.dtype and base.is_contiguous():
        # One pass over the outputs instead of two: the product is added where it is made.
        return torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), up.t()).view_as(base)
    return base + linear(hidden, up).to(base.dtype)


def factor(module: nn.Module) -> Tensor:
    """The weight of a child module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def in_dtype_of(module: nn.Module, x: Tensor) -> Tensor:
    """x as the module can take it: autocast casts for itself, without it x meets the factor's dtype here."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(factor(module).dtype)
