"""The network arguments of every kind of adapter."""

from dataclasses import dataclass

from library.errors import UserError
from networks.core.arguments.lr_curves import LrWeights, parse_lr_weights
from networks.core.arguments.network_arguments import NetworkArguments, Requirement, argument
from networks.core.arguments.values import (
    parse_bool,
    parse_expression_ranks,
    parse_expression_rates,
    parse_number,
    parse_numbers,
    parse_patterns,
    parse_probability,
    parse_rank,
    parse_ranks,
)

LORAPLUS_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
LR_LISTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
IN_BLOCKS = ("block_dims", *LR_LISTS)
ON_CONVOLUTIONS = ("conv_dim", "conv_block_dims")


@dataclass(frozen=True)
class RankArguments:
    """Ranks and alphas of target modules, in addition to `network_dim` and `network_alpha`."""

    conv_dim: int | None = argument(
        parse_rank, None, "Rank of convolutions larger than 1x1, which are adapted with it.", is_fixed_by_file=True
    )
    conv_alpha: float | None = argument(
        parse_number, None, "Alpha of convolutions larger than 1x1.",
        requires=Requirement((ON_CONVOLUTIONS,), "conv_dim"), is_fixed_by_file=True,
    )  # fmt: skip
    block_dims: tuple[int, ...] | None = argument(
        parse_ranks, None, "Rank of each numbered block of a U-Net; 0 leaves a block out.", is_fixed_by_file=True
    )
    block_alphas: tuple[float, ...] | None = argument(
        parse_numbers, None, "Alpha of each numbered block.",
        requires=Requirement((IN_BLOCKS,), "block_dims or one of the *_lr_weight lists"), is_fixed_by_file=True,
    )  # fmt: skip
    conv_block_dims: tuple[int, ...] | None = argument(
        parse_ranks, None, "Rank of the convolutions larger than 1x1 in each block.", is_fixed_by_file=True
    )
    conv_block_alphas: tuple[float, ...] | None = argument(
        parse_numbers,
        None,
        "Alpha of the convolutions larger than 1x1 in each block.",
        requires=Requirement((IN_BLOCKS, ON_CONVOLUTIONS), "block_dims with conv_block_dims or conv_dim"),
        is_fixed_by_file=True,
    )
    rslora: bool = argument(
        parse_bool, False, "alpha / sqrt(rank) in place of alpha / rank.", aliases=("rs_lora",), is_fixed_by_file=True
    )
    network_reg_dims: tuple[tuple[str, int], ...] | None = argument(
        parse_expression_ranks, None, "expression=rank; the first that fits a module decides.", is_fixed_by_file=True
    )


@dataclass(frozen=True)
class RateArguments:
    """Learning rates of target modules, in addition to `learning_rate`, `unet_lr` and `text_encoder_lr`."""

    down_lr_weight: LrWeights | None = argument(parse_lr_weights, None, "Factors of the input blocks, or a curve.")
    mid_lr_weight: LrWeights | None = argument(parse_lr_weights, None, "Factor of the middle block.")
    up_lr_weight: LrWeights | None = argument(parse_lr_weights, None, "Factors of the output blocks, or a curve.")
    block_lr_zero_threshold: float = argument(
        parse_number,
        0.0,
        "Blocks with a factor up to this are not trained.",
        requires=Requirement((LR_LISTS,), "one of the *_lr_weight lists"),
    )
    loraplus_lr_ratio: float | None = argument(parse_number, None, "LoRA+: how much faster up factors learn.")
    loraplus_unet_lr_ratio: float | None = argument(parse_number, None, "The ratio of LoRA+ in the denoiser.")
    loraplus_text_encoder_lr_ratio: float | None = argument(parse_number, None, "The ratio in text encoders.")
    network_reg_lrs: tuple[tuple[str, float], ...] | None = argument(
        parse_expression_rates, None, "expression=rate; the first that fits a module decides."
    )


@dataclass(frozen=True)
class DropoutArguments:
    """Probabilities of dropping parts of the change in training. The base model itself is never dropped."""

    neuron_dropout: float = argument(parse_probability, 0.0, "--network_dropout; LyCORIS calls it `dropout`.")
    rank_dropout: float = argument(parse_probability, 0.0, "Chance of each rank of a sample to be left out.")
    module_dropout: float = argument(parse_probability, 0.0, "Chance of a module to be left out of a step.")


@dataclass(frozen=True)
class StructureArguments:
    """Structure of a module's change."""

    use_tucker: bool = argument(
        parse_bool, False, "A Tucker core between the factors of larger kernels.",
        requires=Requirement((ON_CONVOLUTIONS,), "conv_dim or conv_block_dims: it is for kernels larger than 1x1"),
        is_fixed_by_file=True,
    )  # fmt: skip
    use_scalar: bool = argument(parse_bool, False, "A trained strength, which starts at 0.")
    split_qkv: bool = argument(parse_bool, False, "Adapt q, k and v apart that the base model has in one layer.")


@dataclass(frozen=True)
class TargetArguments:
    """Selection of target modules."""

    train_norm: bool = argument(parse_bool, False, "Train normalisation layers too.", is_fixed_by_file=True)
    exclude_patterns: tuple[str, ...] = argument(
        parse_patterns, (), "Whole module paths that are left alone.", is_fixed_by_file=True
    )
    include_patterns: tuple[str, ...] = argument(
        parse_patterns, (), "Whole module paths that are adapted although they are excluded.", is_fixed_by_file=True
    )
    verbose: bool = argument(parse_bool, False, "List the modules at start.")
    only_patterns: tuple[str, ...] = ()  # set from include_patterns by kinds that adapt nothing else


COMMON: tuple[type, ...] = (RankArguments, RateArguments, DropoutArguments, StructureArguments, TargetArguments)


def check_blocks(arguments: NetworkArguments) -> None:
    """Raise UserError if conv_block_dims is given without block_dims or an *_lr_weight list."""
    if "conv_block_dims" in arguments.given and not any(name in arguments.given for name in IN_BLOCKS):
        raise UserError(
            "--network_args conv_block_dims needs block_dims; give both, or conv_dim for one rank everywhere",
            setting="--network_args conv_block_dims",
            cause="needs",
        )
