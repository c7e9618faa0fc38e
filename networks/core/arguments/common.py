"""The network arguments of every kind of adapter."""

from dataclasses import dataclass

from library.base.errors import error_in
from library.options.declared import Needs, declare
from library.options.kinds import PROBABILITY
from networks.core.arguments.lr_curves import LR_WEIGHTS, LrWeights
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.arguments.values import (
    NUMBER,
    NUMBERS,
    NUMBERS_BY_EXPRESSION,
    PATTERNS,
    RANK,
    RANKS,
    RANKS_BY_EXPRESSION,
    SWITCH,
)

LORAPLUS_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
LR_LISTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
IN_BLOCKS = ("block_dims", *LR_LISTS)
DROPOUTS = ("dropout", "dropout_probability", "boft_dropout")  # in LyCORIS, OFT and BOFT
ON_CONVOLUTIONS = ("conv_dim", "conv_block_dims")


@dataclass(frozen=True)
class RankArguments:
    """Ranks and alphas of target modules, in addition to `network_dim` and `network_alpha`."""

    conv_dim: int | None = declare(RANK, None, is_fixed_by_file=True)
    """Rank of convolutions larger than 1x1, which are adapted with it (LoCon), for styles and textures."""
    conv_alpha: float | None = declare(NUMBER, None, needs=Needs((ON_CONVOLUTIONS,), "conv_dim"), is_fixed_by_file=True)
    """Alpha of convolutions larger than 1x1. Unset is 1."""
    block_dims: tuple[int, ...] | None = declare(RANKS, None, is_fixed_by_file=True)
    """Rank of each numbered block of a U-Net (SD: the first, 11 down, the middle, 12 up); 0 leaves a block out."""
    block_alphas: tuple[float, ...] | None = declare(
        NUMBERS, None, needs=Needs((IN_BLOCKS,), "block_dims or one of the *_lr_weight lists"), is_fixed_by_file=True
    )
    """Alpha of each numbered block."""
    conv_block_dims: tuple[int, ...] | None = declare(RANKS, None, is_fixed_by_file=True)
    """Rank of the convolutions larger than 1x1 in each block."""
    conv_block_alphas: tuple[float, ...] | None = declare(
        NUMBERS,
        None,
        needs=Needs((IN_BLOCKS, ON_CONVOLUTIONS), "block_dims with conv_block_dims or conv_dim"),
        is_fixed_by_file=True,
    )
    """Alpha of the convolutions larger than 1x1 in each block."""
    rslora: bool = declare(SWITCH, False, aliases=("rs_lora",), is_fixed_by_file=True)
    """Strength alpha / sqrt(rank) in place of alpha / rank, for ranks of 64 and more; the saved alpha is larger to
    match."""
    network_reg_dims: tuple[tuple[str, int], ...] | None = declare(RANKS_BY_EXPRESSION, None, is_fixed_by_file=True)
    """expression=rank; the first that fits a module decides."""


@dataclass(frozen=True)
class RateArguments:
    """Learning rates of target modules, in addition to `learning_rate`, `unet_lr` and `text_encoder_lr`."""

    down_lr_weight: LrWeights | None = declare(LR_WEIGHTS, None)
    """Factors on the learning rate of the input blocks (12 of SD), or a curve such as cosine+0.25; a block with 0 gets
    no adapter."""
    mid_lr_weight: LrWeights | None = declare(LR_WEIGHTS, None)
    """Factor on the learning rate of the middle block."""
    up_lr_weight: LrWeights | None = declare(LR_WEIGHTS, None)
    """Factors on the learning rate of the output blocks (12 of SD), or a curve."""
    block_lr_zero_threshold: float = declare(NUMBER, 0.0, needs=Needs((LR_LISTS,), "one of the *_lr_weight lists"))
    """Blocks with a factor up to this are not trained."""
    loraplus_lr_ratio: float | None = declare(NUMBER, None)
    """LoRA+: how many times faster the up matrices learn."""
    loraplus_unet_lr_ratio: float | None = declare(NUMBER, None)
    """The ratio of LoRA+ in the denoiser."""
    loraplus_text_encoder_lr_ratio: float | None = declare(NUMBER, None)
    """The ratio in text encoders."""
    network_reg_lrs: tuple[tuple[str, float], ...] | None = declare(NUMBERS_BY_EXPRESSION, None)
    """expression=rate; the first that fits a module decides."""


@dataclass(frozen=True)
class DropoutArguments:
    """Probabilities of dropping parts of the change in training. The base model itself is never dropped."""

    neuron_dropout: float = declare(PROBABILITY, 0.0, aliases=DROPOUTS)
    """--network_dropout; LyCORIS calls it `dropout`."""
    rank_dropout: float = declare(PROBABILITY, 0.0)
    """Chance of each rank of a sample to be left out."""
    module_dropout: float = declare(PROBABILITY, 0.0)
    """Chance of a module to be left out of a step."""


@dataclass(frozen=True)
class StructureArguments:
    """Structure of a module's change."""

    use_tucker: bool = declare(
        SWITCH,
        False,
        needs=Needs((ON_CONVOLUTIONS,), "conv_dim or conv_block_dims: it is for kernels larger than 1x1"),
        is_fixed_by_file=True,
    )
    """A Tucker core (lora_mid) between the factors of larger kernels, for fewer parameters."""
    use_scalar: bool = declare(SWITCH, False)
    """A trained strength of each module, which starts at 0 and is multiplied into the up matrix when saved."""
    split_qkv: bool = declare(SWITCH, False)
    """Adapt q, k and v apart that the base model has in one layer."""


@dataclass(frozen=True)
class TargetArguments:
    """Selection of target modules."""

    train_norm: bool = declare(SWITCH, False, is_fixed_by_file=True)
    """Train LayerNorm and GroupNorm of the same blocks too (w_norm, b_norm)."""
    exclude_patterns: tuple[str, ...] = declare(PATTERNS, (), is_fixed_by_file=True)
    """Regular expressions for whole module paths that are left alone."""
    include_patterns: tuple[str, ...] = declare(PATTERNS, (), is_fixed_by_file=True)
    """Regular expressions for whole module paths that are adapted although they are excluded; OFT and BOFT then adapt
    nothing else."""
    verbose: bool = declare(SWITCH, False)
    """List the modules at start."""
    only_patterns: tuple[str, ...] = ()  # set from include_patterns by kinds that adapt nothing else


COMMON: tuple[type, ...] = (RankArguments, RateArguments, DropoutArguments, StructureArguments, TargetArguments)


def check_blocks(arguments: NetworkArguments) -> None:
    """Raise UserError if conv_block_dims is given without block_dims or an *_lr_weight list."""
    if "conv_block_dims" in arguments.given and not any(name in arguments.given for name in IN_BLOCKS):
        raise error_in("--network_args conv_block_dims", cause="needs")(
            "--network_args conv_block_dims needs block_dims", "give both, or conv_dim for one rank everywhere"
        )
