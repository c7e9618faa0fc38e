"""Full-rank weight differences, as stored by LyCORIS's `full` and by extractions. They are merged, but not trained."""

import torch
from torch import Tensor

from networks.core.changes.change import MergedOnly, Misfit, ModuleTensors, match_shape
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

DIFF, DIFF_B = "diff", "diff_b"
KEY_OF = {"weight": DIFF, "bias": DIFF_B}  # parameter of the layer -> the key of its change


class Full(MergedOnly):
    """W + `diff` and b + `diff_b`, in the shapes of the layer's parameters. The layer can also be a norm."""

    words = f"{DIFF} of a whole weight"

    def __init__(self, tensors: ModuleTensors) -> None:
        super().__init__()
        for name in (DIFF, DIFF_B):
            self.register_buffer(name, tensors.get(name))
        self.changed_parameters = tuple(name for name, key in KEY_OF.items() if key in tensors)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        change = match_shape(getattr(self, KEY_OF[parameter]), base)
        if change.shape != base.shape:
            raise Misfit("", tuple(change.shape), tuple(base.shape))
        return base + strength * change.to(base.device)

    def norm(self) -> Tensor:
        norms = torch.stack([change.double().norm() for change in self.stored_tensors().values()])
        return norms.square().sum().sqrt()

    def scale_(self, ratio: Tensor) -> None:
        for change in self.stored_tensors().values():
            change.mul_(ratio.to(change))


def shape_of(name: str, tensors: ModuleTensors) -> tuple[int, ...]:
    return tuple(tensors[DIFF].shape)


def rank_of(tensors: ModuleTensors) -> int:
    """Return the highest rank that a matrix of this size can have; 1 for a vector."""
    diff = tensors[DIFF]
    return min(diff.flatten(1).shape) if diff.dim() > 1 else 1


LAYOUT = KeyLayout(
    name="full", words="a whole weight", needs=(DIFF,), read=lambda tensors, _: Full(tensors), may_have=(DIFF_B,),
    rank_of=rank_of, shape_of=shape_of, is_whole=True, targets=frozenset(("plain", "conv", "norm")),
)  # fmt: skip
KIND = AdapterKind(merged_layouts=(LAYOUT,))
