"""LoRA-FA: the down factor is frozen, so the backward pass does not need the layer's input."""

import logging
from collections.abc import Sequence
from math import sqrt

from torch import nn

from networks.core.arguments.common import LORAPLUS_RATIOS, RateArguments
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, Delta, get_weight
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_split import SplitRank
from networks.core.changes.request import ChangeRequest
from networks.core.changes.tlora import TLoraArguments
from networks.core.kinds import lora
from networks.core.registry.adapter_kind import AdapterKind

logger = logging.getLogger(__name__)


def frozen_down(layer: nn.Module, rank: int) -> Delta:
    """Make the delta of LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): dW = up @ down, where only up is trained.

    Stored like `LowRank`. `lora_down.weight` starts normal with deviation sqrt(2 / (I + R)), where I is the number of
    input features or channels. It is a buffer, not a parameter: it is in files, but the optimizer, gradient clipping
    and autograd do not see it. The backward pass keeps the R channels instead of the layer's input.
    """
    delta = LowRank(layer, rank)
    freeze(delta.lora_down, rank)
    return delta


def frozen_split(layer: nn.Linear, rank: int, widths: Sequence[int]) -> Delta:
    """Make the delta of a fused layer, with a frozen down factor for each projection."""
    delta = SplitRank(layer, rank, widths)
    freeze(delta.lora_down, rank)
    return delta


def freeze(down: nn.Module, rank: int) -> None:
    """Initialise the weight of a down factor and make it a buffer."""
    weight = get_weight(down).detach()
    nn.init.normal_(weight, std=sqrt(2 / (weight.shape[1] + rank)))
    # A buffer cannot have the name of a parameter that still exists.
    del down.weight
    down.register_buffer("weight", weight)


def make(request: ChangeRequest) -> Change:
    return lora.make_pair(request, frozen_down, frozen_split)


def warn_of_ratios(adapters: Sequence[Adapter], arguments: NetworkArguments) -> None:
    """Warn that LoRA+ ratios only multiply the learning rate, because there is no trained down factor."""
    ratios = [name for name in LORAPLUS_RATIOS if getattr(arguments.of(RateArguments), name)]
    if ratios:
        logger.warning(
            "--network_args %s: networks.lora_fa trains up factors only, so this just multiplies their learning rate",
            ", ".join(ratios),
        )


KIND = AdapterKind(
    lora.KIND.layouts, make, "networks.lora_fa", wrappers=(TLoraArguments,), prepare=warn_of_ratios,
    refuses={"use_tucker": "the core between the factors would train, and need what freezing lora_down saves"},
)  # fmt: skip
