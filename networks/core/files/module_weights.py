"""The weights that an adapter file has for one module, whatever trainer wrote them.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from networks.core.files.reading_writing import ALPHA, B_NORM, DORA_SCALE, DOWN, MID, UP, W_NORM

Form = Literal["low_rank", "conv", "tucker", "norm", "loha", "lokr", "other"]
LOW_RANK_FORMS: tuple[Form, ...] = ("low_rank", "conv", "tucker")  # those that are up @ down


@dataclass(frozen=True)
class ModuleWeights:
    """One module of an adapter file.

    `tensors` are as in the file, by the leaf that this format has for them, whatever they are called there:
    "lora_down.weight" (R, I) or (R, I, h, w), "lora_up.weight" (O, R) or (O, R, 1, 1), "lora_mid.weight" (R, R, h, w),
    "alpha" (), "dora_scale" (1, I) or (O, 1) or (O,), "w_norm" and "b_norm" (O,). Leaves of other kinds of adapters
    keep their names. `keys` has the key in the file for each leaf.
    """

    name: str  # as in the file, without the leaf: "lora_unet_mid_block_..." or "unet.mid_block...."
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str]
    alpha_elsewhere: float | None = None  # recorded beside the tensors: in the metadata or in adapter_config.json

    @property
    def form(self) -> Form:
        """How the change is stored."""
        leaves = self.tensors.keys()
        if DOWN in leaves and UP in leaves:
            if MID in leaves:
                return "tucker"
            down = self.tensors[DOWN]
            return "conv" if down.dim() == 4 and down.shape[2:] != (1, 1) else "low_rank"
        if W_NORM in leaves or B_NORM in leaves:
            return "norm"
        if any(leaf.startswith("hada_") for leaf in leaves):
            return "loha"
        return "lokr" if any(leaf.startswith("lokr_") for leaf in leaves) else "other"

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is a product of lora_up and lora_down."""
        return self.form in LOW_RANK_FORMS

    @property
    def is_dora(self) -> bool:
        return DORA_SCALE in self.tensors

    @property
    def is_convolution(self) -> bool:
        """Whether the factors have four dimensions, those of 1x1 convolutions included."""
        return self.is_low_rank and self.tensors[DOWN].dim() == 4

    @property
    def rank(self) -> int:
        """R, the number of columns of lora_up."""
        return self.tensors[UP].shape[1]

    @property
    def alpha(self) -> float:
        """As recorded; the rank where nothing is."""
        if ALPHA in self.tensors:
            return float(self.tensors[ALPHA])
        return float(self.rank) if self.alpha_elsewhere is None else self.alpha_elsewhere

    @property
    def scale(self) -> float:
        """alpha / rank, what the product of the factors is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change: (O, I), or (O, I, h, w) for a convolution."""
        up, down = self.tensors[UP], self.tensors[DOWN]
        kernel = self.tensors[MID].shape[2:] if MID in self.tensors else down.shape[2:]
        return (up.shape[0], down.shape[1], *kernel)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(up_OR, down_RN) of which the change is scale * up @ down; a Tucker core is multiplied into down."""
        up_OR, down = self.tensors[UP].to(dtype).flatten(1), self.tensors[DOWN].to(dtype)
        if MID in self.tensors:
            mid_RRhw = self.tensors[MID].to(dtype)
            return up_OR, torch.einsum("pqhw,qi->pihw", mid_RRhw, down.flatten(1)).flatten(1)
        return up_OR, down.flatten(1)

    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * up @ down in the shape of the layer's weight, for DoRA what it adds before the magnitudes."""
        up_OR, down_RN = self.factors(dtype)
        return (self.scale * (up_OR @ down_RN)).reshape(self.shape)

    def merged_weight(self, base: Tensor, strength: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """The layer's weight that computes the same without the adapter, in the shape of `base` and in `dtype`.

        DoRA: base + strength * (m * (base + change) / |base + change| - base), as inference programs do; the norm is
        taken per column of inputs or per row of outputs, as the shape of the magnitudes m says. Raises ValueError when
        the change has another size than `base`.
        """
        base = base.to(dtype)
        change = self.change(dtype)
        if change.shape[:2] != base.shape[:2] or change.numel() != base.numel():
            raise ValueError(
                f"{self.name} changes a weight of the shape {list(change.shape)}, but the base model's is "
                f"{list(base.shape)}; the adapter was made for another base model"
            )
        change = change.to(base.device).reshape(base.shape)
        if not self.is_dora:
            return base + strength * change
        whole = base + change
        magnitude = self.tensors[DORA_SCALE].to(base.device, dtype)
        axis = 1 if magnitude.dim() > 1 and magnitude.shape[:2] == (1, base.shape[1]) else 0
        others = [dim for dim in range(base.dim()) if dim != axis]
        norm: Tensor = torch.linalg.vector_norm(whole, dim=others, keepdim=True) + torch.finfo(torch.float32).eps
        return base + strength * (whole * (magnitude.reshape(norm.shape) / norm) - base)

    def merged_norm(self, leaf: str, base: Tensor, strength: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """`base`, the weight (`leaf` "w_norm") or bias ("b_norm") of a norm layer, with its change."""
        change = self.tensors[leaf].to(base.device, dtype)
        if change.shape != base.shape:
            raise ValueError(f"{self.name}.{leaf} has {change.numel()} values, the base model's layer {base.numel()}")
        return base.to(dtype) + strength * change

    def with_factors(self, up_OR: Tensor, down_RN: Tensor, scale: float) -> "ModuleWeights":
        """The same module with other factors, of which the change is scale * up @ down, without a Tucker core.

        A file that records no alpha gets none: the scale is then multiplied into lora_up. Both factors are stored in
        the dtype of the old ones; everything else of the module stays.
        """
        dtype, rank = self.tensors[DOWN].dtype, down_RN.shape[0]
        if ALPHA not in self.tensors:
            up_OR = up_OR * scale
        shape = self.shape
        kept = {leaf: tensor for leaf, tensor in self.tensors.items() if leaf != MID}
        kept[DOWN] = down_RN.reshape(rank, *shape[1:]).to(dtype).contiguous()
        kept[UP] = up_OR.reshape(shape[0], rank, *(1,) * (len(shape) - 2)).to(dtype).contiguous()
        if ALPHA in kept:
            kept[ALPHA] = alpha_tensor(scale * rank, like=kept[ALPHA])
        keys = {leaf: key for leaf, key in self.keys.items() if leaf in kept}
        return replace(self, tensors=kept, keys=keys, alpha_elsewhere=None)

    def check(self, origin: str) -> None:
        """Raise ValueError where the tensors do not belong together."""
        leaves = self.tensors
        if (DOWN in leaves) != (UP in leaves):
            there, missing = (self.keys[DOWN], "up") if DOWN in leaves else (self.keys[UP], "down")
            raise ValueError(f"{origin} has {there} without its {missing} factor; the file is incomplete")
        if not self.is_low_rank:
            return
        up, down = leaves[UP], leaves[DOWN]
        if up.dim() not in (2, 4) or up.dim() != down.dim():
            raise ValueError(
                f"{origin}: the factors of {self.name} have the shapes {list(up.shape)} and {list(down.shape)}; both "
                "must have 2 dimensions, or 4 for a convolution"
            )
        outer_ranks = leaves[MID].shape[:2] if MID in leaves else (down.shape[0],) * 2
        if outer_ranks != (up.shape[1], down.shape[0]):
            raise ValueError(
                f"{origin}: the factors of {self.name} do not fit together: up is {list(up.shape)}, down is "
                f"{list(down.shape)}" + (f", mid is {list(leaves[MID].shape)}" if MID in leaves else "")
            )


def alpha_tensor(alpha: float, like: Tensor) -> Tensor:
    """An alpha in the dtype of another where that holds it exactly, else in float32."""
    exact = torch.tensor(alpha, dtype=torch.float32)
    rounded = exact.to(like.dtype)
    return rounded if like.is_floating_point() and float(rounded) == float(exact) else exact
