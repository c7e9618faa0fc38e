"""(IA)^3 as in LyCORIS: every output, or every input, of a layer is scaled. It is merged, but not trained."""

from collections.abc import Mapping

from torch import Tensor

from networks.core.changes.change import MergedOnly, Misfit, ModuleTensors
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

WEIGHT, ON_INPUT = "weight", "on_input"


class IA3(MergedOnly):
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): the rows of W, or with `on_input` its columns, times 1 + `weight`.

    `weight` has one number per row or column, in any shape. The bias does not change, as in LyCORIS.
    """

    words = "(IA)^3 of LyCORIS"
    weight: Tensor
    on_input: Tensor

    def __init__(self, tensors: ModuleTensors) -> None:
        super().__init__()
        self.register_buffer(WEIGHT, tensors[WEIGHT])
        self.register_buffer(ON_INPUT, tensors[ON_INPUT])

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        axis = 1 if bool(self.on_input) else 0
        if base.dim() < 2 or base.shape[axis] != self.weight.numel():
            needed = [*base.shape[:axis], self.weight.numel(), *base.shape[axis + 1 :]]
            raise Misfit("", tuple(needed), tuple(base.shape))
        scales = self.weight.flatten().to(base.device).view(-1, *(1,) * (base.dim() - axis - 1))
        return base + strength * base * scales

    def norm(self) -> Tensor:
        """Return the norm of `weight`, the distance of the factors from 1. The change depends on the base weight."""
        norm: Tensor = self.weight.norm()
        return norm

    def scale_(self, ratio: Tensor) -> None:
        self.weight.mul_(ratio.to(self.weight))


def fault(name: str, tensors: ModuleTensors, keys: Mapping[str, str]) -> str | None:
    """Return why the tensors of a module are not valid, or None if they are."""
    if ON_INPUT in tensors and tensors[ON_INPUT].numel() != 1:
        return f"has {keys[ON_INPUT]} of the shape {list(tensors[ON_INPUT].shape)}; it needs one number"
    return None


LAYOUT = KeyLayout(
    name="ia3", words="(IA)^3", needs=(WEIGHT, ON_INPUT), read=lambda tensors, _: IA3(tensors), may_have=(),
    rank_of=lambda tensors: 1, fault=fault, switches=(ON_INPUT,), is_whole=True,
)  # fmt: skip
KIND = AdapterKind(merged_layouts=(LAYOUT,))
