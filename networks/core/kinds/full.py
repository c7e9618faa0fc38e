"""The change of a weight as it is, in no fewer numbers: LyCORIS's `full`, and what extractions have no factors for.

These are read and merged; nothing trains them here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.core.changes.change import Change, Forward, Leaves, Misfit, in_shape_of
from networks.core.kinds.kind import Kind

DIFF, DIFF_B = "diff", "diff_b"
LEAF_OF = {"weight": DIFF, "bias": DIFF_B}  # parameter of the layer -> the leaf of its change


class Full(nn.Module):
    """W + `diff` and b + `diff_b`, in the shapes of the layer's own; the layer can be a norm, too."""

    fast_leaf = ""

    def __init__(self, leaves: Leaves) -> None:
        super().__init__()
        for name in (DIFF, DIFF_B):
            self.register_buffer(name, leaves.get(name))

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        return tuple(name for name, leaf in LEAF_OF.items() if getattr(self, leaf) is not None)

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        raise UserError(f"{DIFF} of a whole weight can be merged, but not trained; merge it with tools/merge_lora.py")

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        change = in_shape_of(getattr(self, LEAF_OF[parameter]), base)
        if change.shape != base.shape:
            raise Misfit("", tuple(change.shape), tuple(base.shape))
        return base + strength * change.to(base.device)

    def norm(self) -> Tensor:
        norms = torch.stack([change.double().norm() for change in self.leaves().values()])
        return norms.square().sum().sqrt()

    def scale_(self, ratio: Tensor) -> None:
        for change in self.leaves().values():
            change.mul_(ratio.to(change))

    def leaves(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, leaves: Leaves) -> None:
        self.load_state_dict(dict(leaves))


def read(leaves: Leaves, layer: nn.Module | None) -> Change:
    """The change of a module from a file."""
    return Full(leaves)


def shape_of(name: str, leaves: Leaves) -> tuple[int, ...]:
    """Of the weight."""
    return tuple(leaves[DIFF].shape)


def rank_of(leaves: Leaves) -> int:
    """That of any matrix of this size."""
    diff = leaves[DIFF]
    return min(diff.flatten(1).shape) if diff.dim() > 1 else 1


KIND = Kind(
    name="full", words="a whole weight", needs=(DIFF,), read=read, may_have=(DIFF_B,), rank_of=rank_of,
    shape_of=shape_of, is_whole=True,
)  # fmt: skip
