"""Block sizes of OFT and BOFT, from the network arguments and the layer."""

import logging
from dataclasses import replace
from math import prod

from torch import nn

from library.base.errors import UserError, about
from networks.core.arguments.common import LORAPLUS_RATIOS, RankArguments, TargetArguments
from networks.core.arguments.network_arguments import NetworkSettings
from networks.core.changes.change import ModuleTensors, weight_shape
from networks.core.changes.parameter_keys import DORA_SCALE

logger = logging.getLogger(__name__)

ALPHAS = ("conv_alpha", "block_alphas", "conv_block_alphas")
REFUSED = {  # network argument -> why rotations do not support it
    "use_tucker": "a rotation has no factors between which a core could lie",
    "split_qkv": "all rows of a layer see the same turned inputs",
    "rslora": "a rotation has no alpha",
    "rank_dropout": "it has no ranks; --network_dropout leaves out blocks",
    **dict.fromkeys(LORAPLUS_RATIOS, "no tensor of a module is to the others what lora_up is to lora_down"),
}


def refuse_magnitudes(tensors: ModuleTensors) -> None:
    """Raise UserError for a rotation with DoRA magnitudes, which OneTrainer can train."""
    if DORA_SCALE in tensors:
        raise UserError(f"{DORA_SCALE} beside a rotation is not computed here", "train without DoRA")


def row_length(layer: nn.Module) -> int:
    """Return N, the number of inputs of one output: I, or I * h * w for a convolution."""
    return prod(weight_shape(layer)[1:])


def block_size_for(num_columns: int, wanted: int, may_adjust: bool) -> int:
    """Return the block size of a layer: `wanted`, or the nearest divisor of its inputs above 1, the smaller of two.

    Raises UserError if `wanted` does not divide the inputs and `may_adjust` is False, or if the layer has one input.
    """
    if wanted > 1 and num_columns % wanted == 0:
        return wanted
    if not may_adjust and wanted > 1:
        raise about("--network_dim")(
            f"(or block_size) is {wanted}, which does not divide the {num_columns} inputs of a layer, and "
            "--network_args auto_adjust=False forbids another size",
            "choose one that divides all layers, or leave auto_adjust out",
        )
    divisors = [size for size in range(2, num_columns + 1) if num_columns % size == 0]
    if not divisors:
        raise UserError("a layer with one input has nothing to turn", "leave it out with exclude_patterns")
    return min(divisors, key=lambda size: (abs(size - wanted), size))


def with_kernels(settings: NetworkSettings, is_enabled: bool) -> NetworkSettings:
    """Set conv_dim to the rank, to adapt larger kernels, if `is_enabled` (enable_conv) and it is not given."""
    if not is_enabled or settings.arguments.of(RankArguments).conv_dim is not None:
        return settings
    return replace(settings, arguments=settings.arguments.replace(RankArguments, conv_dim=settings.rank))


def resolve_blocks(settings: NetworkSettings, block_size: int | None, enable_conv: bool) -> NetworkSettings:
    """Return the settings in the core's terms: the block size takes the place of the rank.

    `block_size` overrides `network_dim`. Only modules that match include_patterns are adapted, if there are any. Warns
    about arguments that have no effect.
    """
    if block_size is not None and settings.is_rank_given and block_size != settings.rank:
        logger.warning("--network_dim %d has no effect: --network_args block_size=%d", settings.rank, block_size)
    ignored = [name for name in ALPHAS if name in settings.arguments.given]
    if ignored:
        logger.warning("--network_args %s has no effect: a rotation has no alpha", ", ".join(ignored))
    settings = with_kernels(replace(settings, rank=block_size or settings.rank), enable_conv)
    # sd-scripts' OFT adapts exactly the modules that include_patterns match; for other kinds they readmit excluded
    # modules.
    patterns = settings.arguments.of(TargetArguments).include_patterns
    arguments = settings.arguments.replace(TargetArguments, only_patterns=patterns, include_patterns=())
    arguments = arguments.replace(RankArguments, conv_alpha=None, block_alphas=None, conv_block_alphas=None)
    return replace(settings, arguments=arguments)
