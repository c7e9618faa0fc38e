"""Separate adapters for the projections that a base model fuses into one layer (split_qkv).

Letters: O output features, I input features, R rank of one projection, N projections.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from library.base.errors import UserError
from networks.core.changes.change import get_weight
from networks.core.changes.low_rank import TwoFactors
from networks.core.changes.parameter_keys import ALPHA, DOWN, UP


class SplitRank(TwoFactors):
    """A LoRA with separate channels for each projection: dW of projection n = up[rows n] @ down[n R : (n + 1) R].

    In memory `lora_down.weight` is (N R, I) and `lora_up.weight` (O, R), with the rows of the layer. In files the up
    factor is (O, N R) with zeros outside the blocks, and alpha is N times as large. This is a plain LoRA of rank N R,
    which every program applies at the trained strength. Both factors start like those of `LowRank`.
    """

    def __init__(self, layer: nn.Linear, rank: int, widths: Sequence[int]) -> None:
        super().__init__()
        assert sum(widths) == layer.out_features, f"{widths} of {layer.out_features}"
        self.rank = rank
        self.widths = tuple(widths)
        self.lora_down = nn.Linear(layer.in_features, rank * len(widths), bias=False, dtype=torch.float32)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False, dtype=torch.float32)
        self.draw(self.lora_down)

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        parts = hidden.chunk(len(self.widths), dim=-1)
        ups = torch.split(get_weight(self.lora_up), list(self.widths))
        return base + torch.cat([linear(h, up) for h, up in zip(parts, ups, strict=True)], dim=-1).to(base.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        return expand(get_weight(self.lora_up), self.widths), get_weight(self.lora_down)

    def as_one(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in memory as one LoRA of all projections, as stored in files."""
        up_ON, alpha = expand(tensors[UP], self.widths), tensors[ALPHA] * len(self.widths)
        return {**tensors, UP: up_ON, ALPHA: alpha}

    def apart(self, tensors: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
        """Return a file's tensors as they are in memory. Raises UserError if one adapter covers all projections."""
        folded = fold(tensors[UP], self.widths)
        if folded is None:
            raise UserError(
                f"{name} is one adapter for all {len(self.widths)} projections of its layer in {source}; split_qkv "
                "trains one for each. Set --network_args split_qkv=False to train it further as it is"
            )
        num_channels = tensors[DOWN].shape[0]
        alpha = float(tensors[ALPHA]) if ALPHA in tensors else float(num_channels)
        return {**tensors, UP: folded, ALPHA: torch.tensor(alpha / len(self.widths), dtype=torch.float32)}


def are_apart(tensors: Mapping[str, Tensor], widths: Sequence[int]) -> bool:
    """Return True if the LoRA of a file is separate for each projection."""
    return fold(tensors[UP], widths) is not None


def expand(up_OR: Tensor, widths: Sequence[int]) -> Tensor:
    """Expand (O, R) to (O, N R): the rows of projection n in columns n R to (n + 1) R, zeros elsewhere."""
    columns = [torch.zeros_like(up_OR) for _ in widths]
    first = 0
    for column, width in zip(columns, widths, strict=True):
        column[first : first + width] = up_OR[first : first + width]
        first += width
    return torch.cat(columns, dim=1)


def fold(up_ON: Tensor, widths: Sequence[int]) -> Tensor | None:
    """Undo `expand` and return (O, R), or None for non-zero values outside the blocks or unequal ranks."""
    if up_ON.dim() != 2 or up_ON.shape[0] != sum(widths) or up_ON.shape[1] % len(widths):
        return None
    rank = up_ON.shape[1] // len(widths)
    rows = torch.split(up_ON, list(widths))
    folded = torch.cat([part[:, n * rank : (n + 1) * rank] for n, part in enumerate(rows)])
    return folded if torch.equal(expand(folded, widths), up_ON) else None
