"""A delta with its scale: alpha, an optional trained strength, and dropout."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from networks.core.changes.change import ChangeSize, Delta, Forward, Misfit, StoredOtherwise, list_parts, match_shape
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.parameter_keys import ALPHA, START
from networks.core.changes.tlora import NoiseMask

SCALAR = "scalar"  # in memory only; files have it multiplied into the delta's `fast_key`


def alpha_in(tensors: Mapping[str, Tensor], delta: Delta) -> float:
    """Return the alpha in a file's tensors, or the rank if there is none."""
    return float(tensors.get(ALPHA, delta.rank))


class WithAlpha(nn.Module):
    """A change with a buffer `alpha`, which stays in float32 when the change is cast to 16 bits: a training state holds
    the buffer, and a resumed run computes with it."""

    alpha: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WithAlpha":
        exact = self.alpha
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.alpha is not None and self.alpha.dtype.itemsize == 2:
            self.alpha = exact.to(self.alpha.device, torch.float32)
        return self


class ScaledDelta(WithAlpha):
    """A change that adds a delta to the weight: y = base(x) + strength * alpha / rank * up(down(x)).

    `alpha` and the tensors of the delta are registered here under their names in files, without a level for the delta.
    Dropout and `mask` act between down and up. Random numbers come from torch's default generators, so recomputing a
    checkpointed block repeats them.

    `scalar` (use_scalar) is a trained factor of the change. It starts at 0, and parameters that would otherwise start
    at zero are drawn at random, so the change still starts at zero.
    """

    alpha: Tensor
    scalar: nn.Parameter | None
    changed_parameters = ("weight",)

    def __init__(
        self,
        layer: nn.Module | None,
        delta: Delta,
        alpha: float,
        drops: Dropout = NO_DROPOUT,
        has_scalar: bool = False,
        mask: NoiseMask | None = None,
    ) -> None:
        """`alpha` 0 means the rank. `layer` can be None if the change is only merged."""
        super().__init__()
        if delta.is_whole:
            alpha = float(delta.rank)
        self.drops = drops
        self.mask = mask
        self.register_buffer(ALPHA, torch.tensor(float(alpha or delta.rank), dtype=torch.float32))
        self.alpha_value = float(alpha or delta.rank)  # used in every call: no device transfer, no rounding
        assert isinstance(delta, nn.Module)
        for name, child in delta.named_children():
            self.add_module(name, child)
        for name, parameter in delta.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in delta.named_buffers(recurse=False):
            assert name != ALPHA
            self.register_buffer(name, buffer, persistent=name in delta.state_dict())
        # nn.Module would register the delta as a child, and keys would get a level that files do not have.
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "layer", layer)  # not registered: it belongs to the base model
        self.delta: Delta
        self.layer: nn.Module | None
        self.register_parameter(SCALAR, nn.Parameter(torch.tensor(0.0)) if has_scalar else None)
        if has_scalar:
            delta.start_moving()
        # The strength in the forward pass comes from alpha_value, so a training state that is loaded must set it too.
        self.register_load_state_dict_post_hook(lambda change, _: change.read_alpha())  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaledDelta":
        """Move or cast. Parameters keep their identity, buffers are replaced, so the delta gets its own again."""
        super()._apply(fn, recurse)
        assert isinstance(self.delta, nn.Module)
        for name, _ in list(self.delta.named_buffers(recurse=False)):
            setattr(self.delta, name, self.get_buffer(name))
        return self

    @property
    def fast_keys(self) -> frozenset[str]:
        return frozenset((self.delta.fast_key,))

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 for a delta without a rank."""
        return 1.0 if self.delta.is_whole else self.alpha_value / self.delta.rank

    @property
    def unit_strength(self) -> Tensor | float:
        """The factor of the delta at strength 1: `scale`, times the trained strength if there is one."""
        if self.scalar is None:
            return self.scale
        strength: Tensor = self.scale * self.scalar
        return strength

    @property
    def size(self) -> ChangeSize:
        delta = self.delta
        return ChangeSize(
            delta.rank, self.alpha_value, has_core=delta.has_core, has_scalar=self.scalar is not None,
            is_whole=delta.is_whole,
        )  # fmt: skip

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output."""
        if self.training and self.drops.skips_this_call():
            return base(x)
        return self.add_to(base(x), x, strength)

    def add_to(self, out: Tensor, x: Tensor, strength: float, columns: Tensor | None = None) -> Tensor:
        """Add the change to the layer's output `out`; `columns` scales the input channels."""
        return self.delta.up(self.between(self.delta.down(x, columns), strength), out)

    def between(self, hidden: Tensor, strength: float) -> Tensor:
        """Apply dropout, mask and scale to the channels between `down` and `up`."""
        strength = strength * self.scale
        if self.training:
            hidden = self.drops.drop(hidden, self.layer)
            strength /= 1 - self.drops.rank
        if self.mask is not None:
            hidden = self.mask(hidden, self.delta.rank, self.layer)
        if self.scalar is not None:
            hidden = hidden * self.scalar
        return hidden if strength == 1 else hidden * strength

    def weight(self) -> Tensor:
        return self.delta.weight() * self.unit_strength

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN); the change is their product times `unit_strength`."""
        return self.delta.factors()

    def weight_for(self, base: Tensor) -> Tensor:
        """Return the change in the shape of `base`. Raises `Misfit` if the sizes differ."""
        change = self.weight()
        axes = 1 if change.dim() == 2 else 2  # a matrix can be a convolution that was stored without its kernel
        if change.shape[:axes] != base.shape[:axes] or change.numel() != base.numel():
            raise Misfit("", tuple(change.shape), tuple(base.shape))
        return change.to(base.device).reshape(base.shape)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        change = self.weight_for(base)
        return base.to(torch.promote_types(base.dtype, change.dtype)) + strength * change

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the Frobenius norm of the change at strength 1, from the factors if the delta has a rank."""
        if self.delta.is_whole:
            # Without a rank the weight is smaller than the products of its factors.
            frobenius: Tensor = torch.linalg.vector_norm(self.weight())
            return frobenius
        strength = torch.abs(s) if isinstance(s := self.unit_strength, Tensor) else abs(s)
        # |B A|^2 is the sum of (B'B) * (AA'), which needs R x R matrices instead of one of the weight's size. Rounding
        # can make a sum near zero negative.
        up_OR, down_RN = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self.delta.factors())
        square = ((up_OR.t() @ up_OR) * (down_RN @ down_RN.t())).sum()
        return square.clamp_min(0).sqrt() * strength

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        """Multiply the change by `ratio`, distributed evenly over the trained tensors."""
        parts = {name: part for name, part in list_parts(self.delta).items() if part.is_floating_point()}
        starts = [part for name, part in parts.items() if name.endswith(START)]
        others = [part for name, part in parts.items() if not name.endswith(START)]
        # The down factor of LoRA-FA is frozen and must stay as it was drawn, so the other factor takes the whole ratio.
        trained = [part for part in others if part.requires_grad] or others
        for part in (*trained, *starts):  # a factor is its start plus its movement
            part.mul_(ratio.to(part) ** (1 / len(trained)))

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors as stored in files, with the trained strength multiplied in."""
        tensors = dict(self.state_dict())
        if not tensors[ALPHA].is_meta:
            tensors[ALPHA] = torch.tensor(self.alpha_value, dtype=torch.float32)
        if SCALAR in tensors:
            scalar = tensors.pop(SCALAR)
            tensors[self.delta.fast_key] = tensors[self.delta.fast_key] * scalar
        return self.delta.as_one(tensors) if isinstance(self.delta, StoredOtherwise) else tensors

    def in_memory(self, tensors: Mapping[str, Tensor], name: str, source: str) -> Mapping[str, Tensor]:
        if isinstance(self.delta, StoredOtherwise):
            return self.delta.apart(tensors, name, source)
        expected = self.state_dict()
        return {
            key: match_shape(tensor, expected[key]) if key in expected else tensor for key, tensor in tensors.items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict(self.completed(tensors))

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's tensors with defaults for optional ones: alpha is the rank, the trained strength 1.

        Files have the trained strength multiplied into a factor.
        """
        strength = {} if self.scalar is None else {SCALAR: torch.ones(())}
        return strength | dict(tensors) | {ALPHA: torch.tensor(alpha_in(tensors, self.delta), dtype=torch.float32)}

    def read_alpha(self) -> None:
        """Copy the loaded alpha to `alpha_value`, unless it is that alpha in float32."""
        # Networks are also made on the meta device, to check a run before anything is loaded.
        if self.alpha.is_meta:
            return
        # A resumed run has to compute with all digits again: those of 0.3, or of alpha * sqrt(rank) with rslora.
        if float(self.alpha) != float(torch.tensor(self.alpha_value, dtype=torch.float32)):
            self.alpha_value = float(self.alpha)
