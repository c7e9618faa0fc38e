"""LoRA: the change of a weight as the product of two small factors.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from library.checkpoints.adapter_names import NAMINGS
from networks.core.changes.alpha import read_with
from networks.core.changes.change import Leaves, check_kernel, factor, in_dtype_of
from networks.core.changes.parameter_keys import ALPHA, DOWN, UP
from networks.core.kinds.kind import Kind


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): dW = up @ down.

    `lora_down.weight` is (R, I) or (R, I, h, w) and starts kaiming uniform with a = sqrt(5); `lora_up.weight` is (O, R)
    or (O, R, 1, 1) and starts at zero, so the change starts at zero. Both are float32.
    """

    has_core = False
    is_whole = False
    fast_leaf = UP

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

    def start_moving(self) -> None:
        start_up_moving(self.lora_up)

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return run_down(self.lora_down, x, columns)

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        return add_product(base, hidden, factor(self.lora_up))

    def pair(self) -> tuple[Tensor, Tensor]:
        return factor(self.lora_down), factor(self.lora_up)

    def factors(self) -> tuple[Tensor, Tensor]:
        return factor(self.lora_up).flatten(1), factor(self.lora_down).flatten(1)

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        return (up_OR @ down_RN).reshape(up_OR.shape[0], *factor(self.lora_down).shape[1:])


def start_up_moving(up: nn.Module) -> None:
    """Draw an up factor as down factors are drawn."""
    nn.init.kaiming_uniform_(factor(up), a=math.sqrt(5))


def run_down(layer: nn.Module, x: Tensor, columns: Tensor | None) -> Tensor:
    """What a down factor makes of x, whose channels are multiplied by `columns` if there are some."""
    if columns is not None:
        return run_like(layer, x, factor(layer), columns)
    return run_like(layer, x, factor(layer))


def run_like(layer: nn.Module, x: Tensor, weight: Tensor, columns: Tensor | None = None) -> Tensor:
    """x through `weight` in place of the layer's own; input column i multiplied by `columns` (1, I) or (1, I, 1, 1).

    The weight is scaled in place of x, so that autograd keeps x itself, which others keep too.
    """
    if columns is not None:
        weight = weight * columns.to(weight.dtype)
    x = in_dtype_of(weight, x)
    if not isinstance(layer, nn.Conv2d):
        return linear(x, weight)
    pixels_BHWI = pixels_in_rows(x)
    if pixels_BHWI is not None and looks_at_one_pixel(layer):
        return linear(pixels_BHWI, weight.flatten(1)).permute(0, 3, 1, 2)
    return conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def narrow_like(layer: nn.Conv2d, rank: int, in_channels: int | None = None) -> nn.Conv2d:
    """A convolution that looks at the same pixels as `layer` and has R output channels, and as many inputs if unset."""
    check_kernel(layer)
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
        pixels_BHWO, hidden_BHWR = pixels_in_rows(base), pixels_in_rows(hidden)
        if pixels_BHWO is None or hidden_BHWR is None:
            return base + conv2d(hidden, up).to(base.dtype)
        return add_product(pixels_BHWO, hidden_BHWR, up.flatten(1)).permute(0, 3, 1, 2)
    if base.dim() > 1 and hidden.dtype == base.dtype and base.is_contiguous():
        # One pass over the outputs instead of two: the product is added where it is made.
        return torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), up.t()).view_as(base)
    return base + linear(hidden, up).to(base.dtype)


def pixels_in_rows(x: Tensor) -> Tensor | None:
    """The pixels of images (B, C, H, W) as (B, H, W, C) in the same memory; None where they do not lie so."""
    pixels_BHWC = x.permute(0, 2, 3, 1)
    return pixels_BHWC if pixels_BHWC.is_contiguous() else None


def looks_at_one_pixel(layer: nn.Conv2d) -> bool:
    """Whether a convolution is a product of every pixel with the same matrix."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)


# --- in files ---


def leaves_of(up_OR: Tensor, down_RN: Tensor, shape: tuple[int, ...], alpha: Tensor | None = None) -> dict[str, Tensor]:
    """The leaves of a LoRA of a weight of `shape`, (O, I) or (O, I, h, w), from factors that are matrices."""
    rank = down_RN.shape[0]
    leaves = {
        DOWN: down_RN.reshape(rank, *shape[1:]).contiguous(),
        UP: up_OR.reshape(shape[0], rank, *(1,) * (len(shape) - 2)).contiguous(),
    }
    return leaves if alpha is None else {**leaves, ALPHA: alpha}


def rank_of(leaves: Leaves) -> int:
    """R, the number of columns of lora_up."""
    return leaves[UP].shape[1]


def shape_of(name: str, leaves: Leaves) -> tuple[int, ...]:
    """Of the weight: (O, I), or (O, I, h, w) for a convolution."""
    return (leaves[UP].shape[0], *leaves[DOWN].shape[1:])


def fault_of_pair(name: str, leaves: Leaves, keys: Mapping[str, str]) -> str | None:
    """Why two factors do not belong together, None where they do."""
    if (DOWN in leaves) != (UP in leaves):
        there, missing = (keys[DOWN], "up") if DOWN in leaves else (keys[UP], "down")
        return f"has {there} without its {missing} factor; the file is incomplete"
    if DOWN not in leaves:
        return None
    up, down = leaves[UP], leaves[DOWN]
    if up.dim() not in (2, 4) or down.dim() not in (2, 4) or up.dim() > down.dim():  # LyCORIS's DyLoRA has 2 and 4
        return (
            f": the factors of {name} have the shapes {list(up.shape)} and {list(down.shape)}; both "
            "must have 2 dimensions, or 4 for a convolution"
        )
    return None


def fault(name: str, leaves: Leaves, keys: Mapping[str, str]) -> str | None:
    """Why the tensors of a module do not belong together, None where they do."""
    wrong = fault_of_pair(name, leaves, keys)
    if wrong is not None or UP not in leaves:
        return wrong
    up, down = leaves[UP], leaves[DOWN]
    if up.shape[1] == down.shape[0]:
        return None
    return f": the factors of {name} do not fit together: up is {list(up.shape)}, down is {list(down.shape)}"


KIND = Kind(
    name="low_rank",
    words="LoRA",
    needs=(DOWN, UP),
    read=read_with(LowRank, rank_of, shape_of),
    rank_of=rank_of,
    shape_of=shape_of,
    is_low_rank=True,
    ends=(DOWN, UP),
    scaled=UP,
    namings=frozenset(NAMINGS),
    together="lora_down and lora_up",
    fault=fault,
    door="networks.lora",
)
