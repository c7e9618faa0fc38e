"""Sizes of the blocks of OFT and BOFT, from the network arguments and the layer."""

import logging
from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from library.errors import UserError
from networks.core.changes.change import Leaves
from networks.core.changes.parameter_keys import DORA_SCALE

logger = logging.getLogger(__name__)

ALPHAS = ("conv_alpha", "block_alphas", "conv_block_alphas")
LORAPLUS_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
REFUSED = {  # network argument -> why it does not work with what turns
    "use_tucker": "a rotation has no factors between which a core could lie",
    "split_qkv": "all rows of a layer see the same turned inputs",
    "rslora": "a rotation has no alpha",
    "rank_dropout": "it has no ranks; --network_dropout leaves out blocks",
    **dict.fromkeys(LORAPLUS_RATIOS, "no tensor of a module is to the others what lora_up is to lora_down"),
}


def refuse_magnitudes(leaves: Leaves) -> None:
    """Raise UserError for a rotation with magnitudes, as OneTrainer can train it."""
    if DORA_SCALE in leaves:
        raise UserError(f"{DORA_SCALE} beside a rotation is not computed here; train without DoRA")


def row_length(layer: nn.Module) -> int:
    """N: how many numbers one output sees, I or I * h * w."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels * prod(layer.kernel_size)


def num_outputs(layer: nn.Module) -> int:
    """O."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    assert isinstance(layer, nn.Conv2d)
    return layer.out_channels


def block_size_for(num_columns: int, wanted: int, may_adjust: bool) -> int:
    """The block size of a layer: `wanted`, or the divisor of its columns that is nearest to it, the smaller of two.

    Raises UserError where it divides nothing and `may_adjust` is False, or where there is nothing to turn.
    """
    if wanted > 1 and num_columns % wanted == 0:
        return wanted
    if not may_adjust and wanted > 1:
        raise UserError(
            f"--network_dim (or block_size) is {wanted}, which does not divide the {num_columns} inputs of a layer, "
            "and --network_args auto_adjust=False forbids another size; choose one that divides all layers, or leave "
            "auto_adjust out"
        )
    divisors = [size for size in range(2, num_columns + 1) if num_columns % size == 0]
    if not divisors:
        raise UserError("a layer with one input has nothing to turn; leave it out with exclude_patterns")
    return min(divisors, key=lambda size: (abs(size - wanted), size))


def with_kernels(size: int, arguments: Any) -> Any:
    """The arguments where `enable_conv` asks for larger kernels too, of `size` where they have none of their own."""
    conv_dim = size if arguments.enable_conv and arguments.conv_dim is None else arguments.conv_dim
    return replace(arguments, conv_dim=conv_dim)


def resolve(rank: int | None, arguments: Any, default: int) -> tuple[int, Any]:
    """(block size, network arguments) as the core of the networks understands them.

    `block_size` goes before --network_dim, `enable_conv` asks for larger kernels with blocks of the same size, and
    include_patterns mean that nothing else is adapted.
    """
    size = arguments.block_size or rank
    if arguments.block_size is not None and rank is not None and arguments.block_size != rank:
        logger.warning("--network_dim %d has no effect: --network_args block_size=%d", rank, arguments.block_size)
    given = [name for name in ALPHAS if getattr(arguments, name) is not None]
    if given:
        logger.warning("--network_args %s has no effect: a rotation has no alpha", ", ".join(given))
    size = default if size is None else size
    resolved = replace(
        with_kernels(size, arguments), only_patterns=arguments.include_patterns, include_patterns=(), conv_alpha=None,
        block_alphas=None, conv_block_alphas=None,
    )  # fmt: skip
    return size, resolved
