"""LoRA-FA: the down factor is frozen, so the layer's input need not be kept for the backward pass."""

import logging
from collections.abc import Sequence
from math import sqrt

from torch import nn

from networks.core.changes.change import Delta, factor
from networks.core.changes.qkv_split import SplitRank
from networks.core.kinds.kind import Network
from networks.core.kinds.lora import LowRank

logger = logging.getLogger(__name__)

LORAPLUS_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")


def frozen_down(layer: nn.Module, rank: int) -> Delta:
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): dW = up @ down, where only up trains.

    Stored as `LowRank` is. `lora_down.weight` starts normal with the deviation sqrt(2 / (I + R)), I being the input
    features or channels. It is a buffer: in files, but no parameter, so neither the optimizer, nor the limit on the
    gradient's norm, nor autograd ever meets it. The backward pass keeps the R channels instead of the layer's input.
    """
    delta = LowRank(layer, rank)
    freeze(delta.lora_down, rank)
    return delta


def frozen_split(layer: nn.Linear, rank: int, widths: Sequence[int]) -> Delta:
    """The same for each projection of a fused layer."""
    delta = SplitRank(layer, rank, widths)
    freeze(delta.lora_down, rank)
    return delta


def freeze(down: nn.Module, rank: int) -> None:
    """Draw the weight of a down factor and make it a buffer."""
    weight = factor(down).detach()
    nn.init.normal_(weight, std=sqrt(2 / (weight.shape[1] + rank)))
    del down.weight
    down.register_buffer("weight", weight)


def warn_of_ratios(network: Network) -> None:
    """Say what LoRA+ comes to where there is no down factor to compare with."""
    given = [name for name in LORAPLUS_RATIOS if getattr(network.arguments, name)]
    if given:
        logger.warning(
            "--network_args %s: networks.lora_fa trains up factors only, so this just multiplies their learning rate",
            ", ".join(given),
        )
