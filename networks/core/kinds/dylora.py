"""DyLoRA: an adapter whose first k ranks form an adapter of rank k, for every multiple k of a unit.

Letters: O output features or channels, I input features or channels, R rank, K the ranks of this step, h w kernel.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from library.base.errors import error_in
from library.base.randomness import random_for
from library.options.declared import Needs, declare
from networks.core.arguments.common import ON_CONVOLUTIONS
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.arguments.values import SWITCH, UNIT
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, delta_of, get_weight
from networks.core.changes.low_rank import LowRank, TwoFactors
from networks.core.changes.qkv_split import SplitRank
from networks.core.changes.request import ChangeRequest
from networks.core.kinds import lora
from networks.core.registry.adapter_kind import AdapterKind, StartStep
from networks.core.targets.targets import TargetModule

logger = logging.getLogger(__name__)

STREAM = "dylora rank"
UNITS: Mapping[str, tuple[str, str]] = {  # kind of target module -> (argument, options that set the rank)
    "plain": ("unit", "--network_dim (or block_dims)"),
    "conv": ("conv_unit", "conv_dim (or conv_block_dims)"),
}


@dataclass(frozen=True)
class DyloraArguments:
    """The network arguments of DyLoRA."""

    unit: int = declare(UNIT, 1, aliases=("dyloRA",))
    """Ranks are trained in blocks of so many: 4, 8, 12 and so on with 4. Every rank must be a multiple of it."""
    conv_unit: int = declare(UNIT, 1, needs=Needs((ON_CONVOLUTIONS,), "conv_dim"))
    """The blocks of convolutions larger than 1x1, which train the same share of their rank as other layers."""
    train_all_ranks: bool = declare(SWITCH, True)
    """Train all rows up to the rank of a step; false trains its newest block, which learns more slowly."""


def resolve_nested_rank(rank: int, step_rank: int, full_rank: int, unit: int = 1) -> int:
    """Return the active rank of a module of `rank` when the network, with rank `full_rank`, is at `step_rank`.

    It is the same share of the module's rank, rounded to a multiple of `unit` and at least one unit. `rank` must be a
    multiple of `unit`. A module of rank `full_rank` gets exactly `step_rank`.
    """
    # (2 a + b) // 2 b rounds a / b to the nearest integer, halves up, without floating point.
    num_units = (2 * rank * step_rank + full_rank * unit) // (2 * full_rank * unit)
    return unit * max(1, num_units)


class NestedRank(TwoFactors):
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): dW = up[:, :K] @ down[:K], where K is drawn for every step.

    Stored like `LowRank`. In training only the first K rows of `lora_down` and columns of `lora_up` are multiplied, so
    the trained change is that of a file cut at K. In evaluation all R are used. The scale is that of the full rank at
    every K: a column has the same meaning for every drawn rank, and a file cut at K has alpha * K / R.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.rank = rank
        lora = LowRank(layer, rank)
        self.lora_down, self.lora_up = lora.lora_down, lora.lora_up
        self._rows: tuple[int, int] | None = None  # of this step: first trained row, end of the multiplied rows

    def use_rows(self, first_learning: int, end: int) -> None:
        """Multiply rows and columns 0 to `end` in the next steps, without training those before `first_learning`."""
        assert 0 <= first_learning < end <= self.rank
        self._rows = (first_learning, end)

    def down_factor(self) -> Tensor:
        return part(get_weight(self.lora_down), 0, *self._rows_of_this_call())

    def up_factor(self) -> Tensor:
        return part(get_weight(self.lora_up), 1, *self._rows_of_this_call())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (up_OR, down_RN) of the full rank."""
        return get_weight(self.lora_up).flatten(1), get_weight(self.lora_down).flatten(1)

    def _rows_of_this_call(self) -> tuple[int, int]:
        """Return (first trained row, end): all rows in evaluation, otherwise those of the step.

        `lora_down` has the mode, since eval() reaches the factors as part of the network.
        """
        if not self.lora_down.training:
            return 0, self.rank
        if self._rows is None:
            raise RuntimeError(
                "networks.dylora draws a rank for each optimizer step, but nobody said which step this is: call "
                "on_optimizer_step_start(seed, step) of the network before each step, or its eval() for the full rank"
            )
        return self._rows


def part(weight: Tensor, axis: int, first: int, end: int) -> Tensor:
    """Cut `weight` to `end` on an axis. Only the part from `first` on has a gradient."""
    if first == 0:
        return weight.narrow(axis, 0, end)
    return torch.cat([weight.detach().narrow(axis, 0, first), weight.narrow(axis, first, end - first)], axis)


def make(request: ChangeRequest) -> Change:
    return lora.make_pair(request, NestedRank, SplitRank)


def prepare(adapters: Sequence[Adapter], arguments: NetworkArguments) -> StartStep:
    """Check the ranks and return the function that draws one for each optimizer step."""
    dylora = arguments.of(DyloraArguments)
    check_units(adapters, dylora)
    return partial(draw_rank, dylora)


def draw_rank(arguments: DyloraArguments, adapters: Sequence[Adapter], seed: int, step: int) -> None:
    """Draw the rank of optimizer step `step` (from 0) for all modules; every multiple of the unit is equally likely.

    It is a function of seed and step, so it is the same in every process, in every batch of an accumulation window, in
    a recomputed block and after a resume. With `train_all_ranks` (the default) all rows up to it are trained; without,
    as in the paper's frozen variant, only those that the next smaller rank lacks.
    """
    modules = list_nested_modules(adapters)
    if not modules:  # only norms are trained
        return
    full_rank, unit = largest_rank(modules, arguments)
    ranks = range(unit, full_rank + 1, unit)
    index = random_for(seed, STREAM, step).randrange(len(ranks))
    rows: dict[tuple[int, int], tuple[int, int]] = {}  # by (rank, unit), of which a network has few
    for target, delta in modules:
        key = (delta.rank, resolve_unit(target, arguments))
        if key not in rows:
            nested_ranks = [resolve_nested_rank(key[0], rank, full_rank, key[1]) for rank in ranks[: index + 1]]
            previous = max((rank for rank in nested_ranks if rank < nested_ranks[-1]), default=0)
            rows[key] = (0 if arguments.train_all_ranks else previous, nested_ranks[-1])
        delta.use_rows(*rows[key])


def check_units(adapters: Sequence[Adapter], arguments: DyloraArguments) -> None:
    """Log the trained ranks. Raises UserError with the nearest multiples if a rank is not a multiple of its unit."""
    modules = list_nested_modules(adapters)
    for target, delta in modules:
        unit = resolve_unit(target, arguments)
        if delta.rank % unit:
            name, setting = UNITS[target.kind]
            lower = delta.rank - delta.rank % unit
            nearest = f"{lower} or {lower + unit}" if lower else str(unit)
            raise error_in(f"--network_args {name}")(
                f"--network_args {name}={unit}: {target.name} has rank {delta.rank}, which is no multiple of it",
                f"set {setting} to {nearest}, or choose another {name}",
            )
    if modules:
        full_rank, unit = largest_rank(modules, arguments)
        logger.info(
            "DyLoRA: each step trains one rank from %d to %d in units of %d; %s",
            unit, full_rank, unit,
            "all rows up to it learn" if arguments.train_all_ranks else "its newest block learns",
        )  # fmt: skip


def largest_rank(modules: Sequence[tuple[TargetModule, NestedRank]], arguments: DyloraArguments) -> tuple[int, int]:
    """Return (full rank, unit) of a network: the largest of plain layers, or of convolutions if there are no others."""
    plain = [(delta.rank, resolve_unit(target, arguments)) for target, delta in modules if target.kind == "plain"]
    return max(plain or [(delta.rank, resolve_unit(target, arguments)) for target, delta in modules])


def resolve_unit(target: TargetModule, arguments: DyloraArguments) -> int:
    """Return the block size of one module's rank."""
    return arguments.unit if target.kind == "plain" else arguments.conv_unit


def list_nested_modules(adapters: Sequence[Adapter]) -> list[tuple[TargetModule, NestedRank]]:
    """Return the modules that have a rank; trained norms have none."""
    deltas = [(adapter.target, delta_of(adapter.change)) for adapter in adapters]
    return [(target, delta) for target, delta in deltas if isinstance(delta, NestedRank)]


KIND = AdapterKind(
    lora.KIND.layouts, make, "networks.dylora", arguments=DyloraArguments, prepare=prepare,
    refuses={
        "dora_wd": "the magnitudes of DoRA belong to one rank, so a file cut at another computes something else",
        "split_qkv": "a file cut at a smaller rank would hold the first projections only",
        "use_tucker": "the core between the factors mixes all ranks, so the first of them are no adapter alone",
    },
)  # fmt: skip
