"""A delta at its strength: alpha, a trained strength, dropout, and the join with the base weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from networks.core.changes.change import (
    Delta,
    Forward,
    Leaves,
    MakeDelta,
    Misfit,
    StoredOtherwise,
    fill,
    parts_of,
    stand_in,
)
from networks.core.changes.dora import Add, Decompose, Join, are_per_output, scale_columns, scale_outputs
from networks.core.changes.ggpo import Perturbation, add_noise
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE, DOWN, START, UP
from networks.core.changes.tlora import TLoraRanks

DEVIATION = "ggpo_deviation"  # in memory and in states only
SCALAR = "scalar"  # in memory only: files have it multiplied into the factor that starts at zero


@dataclass(frozen=True)
class Dropout:
    """What is left out while training, as chances; all of it acts on the change only, never on the base model."""

    neuron: float = 0.0  # single numbers between down and up, the others scaled up (--network_dropout)
    rank: float = 0.0  # whole channels of a sample between down and up, the others scaled up
    module: float = 0.0  # the whole change of this call; nothing is scaled


NO_DROPOUT = Dropout()


class ScaledDelta(nn.Module):
    """y = base(x) + strength * alpha / rank * up(down(x)): every kind that adds something to the weight.

    `alpha` and the parts of the delta are named as in files: what is registered in the delta is registered here, so
    names have no level for it. Random numbers come from torch's default generators, so recomputing a checkpointed block
    repeats them.

    `scalar` (use_scalar) is a trained number that multiplies the change. It starts at 0, and what else would start at
    zero then moves, so the change still starts at zero. `dora_scale` (1, I) or (1, I, 1, 1) are the magnitudes of a
    join that has some: every input column of the changed weight is brought to its magnitude, which is done to the input
    instead, so that no weight is built; or (O, 1) or (O, 1, 1, 1), those of its rows, which is done to the output.
    Dropout acts between down and up; the norms are those of the whole change.
    """

    alpha: Tensor
    scalar: nn.Parameter | None
    dora_scale: nn.Parameter | None
    changed_parameters = ("weight",)

    def __init__(
        self,
        layer: nn.Module | None,
        delta: Delta,
        join: Join,
        alpha: float,
        drops: Dropout = NO_DROPOUT,
        has_scalar: bool = False,
    ) -> None:
        """`alpha` 0 stands for the rank. `layer` None is for merging alone."""
        super().__init__()
        if delta.is_whole:
            alpha = float(delta.rank)
        self.join = join
        self.drops = drops
        self.tlora_ranks: TLoraRanks | None = None  # all ranks act on every sample
        self.noise_levels_B: Tensor | None = None  # of the batch, 0 to 1; None where there is none
        self.perturbation: Perturbation | None = None
        self.is_perturbed = False  # from the first gradient on
        self.register_buffer(ALPHA, torch.tensor(float(alpha or delta.rank), dtype=torch.float32))
        self.alpha_value = float(alpha or delta.rank)  # read every call: no transfer from the device, no rounding
        assert isinstance(delta, nn.Module)
        for name, child in delta.named_children():
            self.add_module(name, child)
        for name, parameter in delta.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "layer", layer)  # the base model's own, which is no part of the adapter
        self.delta: Delta
        self.layer: nn.Module | None
        magnitudes = join.magnitudes()
        self.register_parameter(DORA_SCALE, None if magnitudes is None else nn.Parameter(magnitudes))
        self.register_parameter(SCALAR, nn.Parameter(torch.tensor(0.0)) if has_scalar else None)
        if has_scalar:
            delta.start_moving()
        self.register_load_state_dict_post_hook(_read_alpha)  # type: ignore[no-untyped-call]

    @classmethod
    def from_leaves(cls, delta: Delta, leaves: Mapping[str, Tensor], layer: nn.Module | None) -> "ScaledDelta":
        """A delta of a file with the alpha and the magnitudes that the file has."""
        alpha = float(leaves[ALPHA]) if ALPHA in leaves else 0.0
        change = cls(layer, delta, Add(), alpha)
        change.alpha_value = alpha if ALPHA in leaves else float(delta.rank)  # an alpha of 0 in a file is 0
        if DORA_SCALE in leaves:
            weight = None if layer is None else layer.weight
            assert weight is None or isinstance(weight, Tensor)
            change.join = Decompose(weight, is_per_output=are_per_output(leaves[DORA_SCALE]))
            change.dora_scale = nn.Parameter(leaves[DORA_SCALE], requires_grad=False)
        return change

    def perturb(self, sigma: float, beta: float) -> None:
        """Train with noise on the weight, whose strength follows from `note_gradients` (GGPO)."""
        self.perturbation = Perturbation.of(sigma, beta, self._base_weight)
        self.register_buffer(DEVIATION, torch.zeros(len(self.get_parameter(UP))))

    def note_gradients(self) -> None:
        """Set the strength of the noise by the factors and by the gradients that they have."""
        if self.perturbation is None:
            return
        up, down = self.get_parameter(UP), self.get_parameter(DOWN)
        if up.grad is None or down.grad is None:
            return  # without a learning rate
        up_OR, down_RN, up_grad_OR, down_grad_RN = (t.flatten(1) for t in (up, down, up.grad, down.grad))
        deviations_O = self.perturbation.deviations(up_OR, down_RN, up_grad_OR, down_grad_RN, self.scale)
        self.get_buffer(DEVIATION).copy_(deviations_O)
        self.is_perturbed = True

    @property
    def fast_leaf(self) -> str:
        return self.delta.fast_leaf

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where there is no rank."""
        return 1.0 if self.delta.is_whole else self.alpha_value / self.delta.rank

    @property
    def forms(self) -> tuple[str, ...]:
        """What is particular to this change, in a user's words."""
        found = (
            ("DoRA", self.dora_scale is not None and not self.join.is_per_output),
            ("DoRA per output", self.join.is_per_output),
            ("a Tucker core", self.delta.has_core),
            ("a trained strength", self.scalar is not None),
        )
        return tuple(words for words, is_there in found if is_there)

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """What the layer computes with the change; shapes and dtype are those of the layer alone."""
        if self._skips_this_call():
            return base(x)
        if self.dora_scale is None:
            out = base(x)
            if self.is_perturbed and self.training:
                assert self.layer is not None
                out = add_noise(out, x, self.layer, self.get_buffer(DEVIATION))
            return self.delta.up(self._drop_and_scale(self.delta.down(x), strength), out)
        scales = self.scales()
        assert scales is not None
        if self.join.is_per_output:
            return self._with_scaled_outputs(x, base, strength, scales)
        whole = scales if strength == 1 else 1 + strength * (scales - 1)
        out = base(scale_columns(x, whole))
        return self.delta.up(self._drop_and_scale(self.delta.down(x, scales), strength), out)

    def scales(self) -> Tensor | None:
        """What DoRA multiplies every column of the changed weight by, or every row; None without magnitudes."""
        return None if self.dora_scale is None else self._scales(self.dora_scale)

    def weight(self) -> Tensor:
        return self.delta.weight() * self._unit_strength

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up_OR, down_RN) of which the change is `scale` times the product."""
        return self.delta.factors()

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        change = self.weight()
        axes = 1 if change.dim() == 2 else 2  # a matrix can be a convolution whose kernel the file does not tell
        if change.shape[:axes] != base.shape[:axes] or change.numel() != base.numel():
            raise Misfit("", tuple(change.shape), tuple(base.shape))
        change = change.to(base.device).reshape(base.shape)
        base = base.to(torch.promote_types(base.dtype, change.dtype))
        return self.join.merge(base, change, strength, self.dora_scale)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The Frobenius norm of the change at strength 1, from the small factors alone."""
        if self.delta.is_whole:
            whole: Tensor = torch.linalg.vector_norm(self.weight())
            return whole  # without a rank the weight is smaller than products of its factors
        strength = torch.abs(s) if isinstance(s := self._unit_strength, Tensor) else abs(s)
        up_OR, down_RN = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self.delta.factors())
        square = ((up_OR.t() @ up_OR) * (down_RN @ down_RN.t())).sum()
        return square.clamp_min(0).sqrt() * strength

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        """Multiply the change by a number, shared out evenly to the parts that train."""
        parts = parts_of(self.delta)
        starts = [part for name, part in parts.items() if name.endswith(START)]
        others = [part for name, part in parts.items() if not name.endswith(START)]
        trained = [part for part in others if part.requires_grad] or others
        for part in (*trained, *starts):  # a factor is its start and how far it has moved
            part.mul_(ratio.to(part) ** (1 / len(trained)))

    def leaves(self) -> Mapping[str, Tensor]:
        """As in files: a trained strength is multiplied in, and what is stored otherwise in memory is one LoRA."""
        tensors = {leaf: tensor for leaf, tensor in self.state_dict().items() if leaf != DEVIATION}
        if not tensors[ALPHA].is_meta:
            tensors[ALPHA] = torch.tensor(self.alpha_value, dtype=torch.float32)
        if SCALAR in tensors:
            scalar = tensors.pop(SCALAR)
            tensors[self.fast_leaf] = tensors[self.fast_leaf] * scalar
        return self.delta.as_one(tensors) if isinstance(self.delta, StoredOtherwise) else tensors

    @torch.no_grad()
    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Take over the tensors of a file, in the form that the delta has in memory.

        A trained strength becomes 1, as the file has it in its factors. Magnitudes that the file lacks are set so that
        the layer computes what the file does.
        """
        alpha = torch.tensor(float(leaves[ALPHA]) if ALPHA in leaves else float(self.delta.rank), dtype=torch.float32)
        defaults = {} if self.scalar is None else {SCALAR: torch.ones(())}
        if self.perturbation is not None:
            defaults[DEVIATION] = self.get_buffer(DEVIATION)
        if self.dora_scale is not None:
            defaults[DORA_SCALE] = self.dora_scale
        self.load_state_dict({**defaults, **leaves, ALPHA: alpha})
        if self.dora_scale is not None and DORA_SCALE not in leaves:
            self.restart_magnitudes()

    @torch.no_grad()
    def restart_magnitudes(self) -> None:
        """Set the magnitudes to the norms of the weight with the change: together they compute what the sum does."""
        assert self.dora_scale is not None
        device = self._base_weight.device
        ones = torch.ones_like(self.dora_scale, device=device)
        self.dora_scale.copy_(ones / self._scales(ones, device))

    @property
    def _base_weight(self) -> Tensor:
        assert self.layer is not None
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _unit_strength(self) -> Tensor | float:
        """What the delta is multiplied by at strength 1."""
        if self.scalar is None:
            return self.scale
        strength: Tensor = self.scale * self.scalar
        return strength

    def _with_scaled_outputs(self, x: Tensor, base: Forward, strength: float, rows: Tensor) -> Tensor:
        """The layer where every row of the changed weight is multiplied by one of `rows`."""
        assert self.layer is not None
        alone = base(x)
        out = self.delta.up(self._drop_and_scale(self.delta.down(x), 1.0), alone)
        out = scale_outputs(out, rows.flatten(), self.layer)
        return out if strength == 1 else torch.lerp(alone, out, strength)

    def _scales(self, magnitudes: Tensor, device: torch.device | None = None) -> Tensor:
        """The factor of every column, or row, of the changed weight."""
        strength = self._unit_strength
        if isinstance(strength, Tensor) and device is not None:
            strength = strength.to(device)
        up_OR, down_RN = self.delta.factors()
        if device is not None:
            up_OR, down_RN = up_OR.to(device), down_RN.to(device)
        return self.join.scales(self._base_weight, magnitudes, up_OR, down_RN, strength)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaledDelta":
        """Move or cast. Magnitudes are never rounded to 16 bits: they would change the base model's own columns."""
        exact = None if self.dora_scale is None else self.dora_scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.dora_scale is not None and exact is not None and self.dora_scale.dtype.itemsize == 2:
            self.dora_scale.data = exact.to(self.dora_scale.device)
        return self

    def _skips_this_call(self) -> bool:
        return self.training and self.drops.module > 0 and float(torch.rand(())) < self.drops.module

    def _drop_and_scale(self, hidden: Tensor, strength: float) -> Tensor:
        strength = strength * self.scale
        if self.training:
            if self.drops.neuron > 0:
                hidden = dropout(hidden, self.drops.neuron)
            if self.drops.rank > 0:
                hidden = hidden * self._rank_mask(hidden)
                strength /= 1 - self.drops.rank
        if self.tlora_ranks is not None and self.noise_levels_B is not None:
            hidden = hidden * self._noise_mask(hidden, self.tlora_ranks, self.noise_levels_B)
        if self.scalar is not None:
            hidden = hidden * self.scalar
        return hidden if strength == 1 else hidden * strength

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """0 or 1 for every sample and channel, in a shape that meets `hidden`."""
        keep_BK = torch.rand(len(hidden), self._num_channels(hidden), device=hidden.device) > self.drops.rank
        return self._per_channel(keep_BK, hidden)

    def _noise_mask(self, hidden: Tensor, ranks: TLoraRanks, levels_B: Tensor) -> Tensor:
        """The same for the ranks that act at the noise level of each sample."""
        if len(hidden) != len(levels_B):
            raise RuntimeError(f"a layer runs {len(hidden)} samples, but noise levels were told of {len(levels_B)}")
        keep_BK = ranks.kept(self.delta.rank, self._num_channels(hidden), levels_B.to(hidden.device))
        return self._per_channel(keep_BK, hidden)

    def _num_channels(self, hidden: Tensor) -> int:
        """K, the channels between down and up."""
        return hidden.shape[1 if isinstance(self.layer, nn.Conv2d) else -1]

    def _per_channel(self, keep_BK: Tensor, hidden: Tensor) -> Tensor:
        others = (1,) * (hidden.dim() - 2)
        num_samples, num_channels = keep_BK.shape
        shape = (num_channels, *others) if isinstance(self.layer, nn.Conv2d) else (*others, num_channels)
        return keep_BK.to(hidden.dtype).view(num_samples, *shape)


def read_with(
    make_delta: MakeDelta,
    rank_of: Callable[[Leaves], int],
    shape_of: Callable[[str, Leaves], tuple[int, ...]],
    make_core: MakeDelta | None = None,
    core: Sequence[str] = (),
) -> Callable[[Leaves, nn.Module | None], ScaledDelta]:
    """A function that reads the change of a module from a file: `Kind.read`. `make_core` where it has leaves of one."""

    def read(leaves: Leaves, layer: nn.Module | None) -> ScaledDelta:
        make = make_core if make_core is not None and any(leaf in leaves for leaf in core) else make_delta
        with torch.device("meta"):
            delta = make(layer or stand_in(shape_of("", leaves)), rank_of(leaves))
        assert isinstance(delta, nn.Module)
        fill(delta, leaves)
        return ScaledDelta.from_leaves(delta, leaves, layer)

    return read


def _read_alpha(change: nn.Module, _: object) -> None:
    """After loading weights the strength follows the alpha that was loaded, and noise goes on if there was some."""
    assert isinstance(change, ScaledDelta)
    if change.perturbation is not None and not change.alpha.is_meta:
        change.is_perturbed = bool(change.get_buffer(DEVIATION).any())
    if not change.alpha.is_meta:
        change.alpha_value = float(change.alpha)
