"""Rules for the rank, alpha and learning rate of a module, from network arguments and the module's position."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from library.base.errors import about, error_in
from networks.core.arguments.common import LR_LISTS, RankArguments, RateArguments
from networks.core.arguments.lr_curves import LR_CURVES, LrPreset, LrWeights
from networks.core.arguments.network_arguments import NetworkArguments
from networks.core.targets.selection import Choices, Expressions
from networks.core.targets.targets import AdapterTargets, BlockList, Part, TargetModule

logger = logging.getLogger(__name__)

DEFAULT_CONV_ALPHA = 1.0


@dataclass(frozen=True)
class TargetSettings:
    """Rank, alpha and learning rate of one module. Rank 0 skips the module, except for norms."""

    rank: int
    alpha: float
    lr_factor: float = 1.0
    block: int | None = None  # set if blocks have separate learning rates
    lr: float | None = None  # from network_reg_lrs; replaces the rate of the part
    expression: int | None = None  # index of the entry of network_reg_lrs that set it


@dataclass(frozen=True)
class BlockTable:
    """Ranks and alphas, one entry per numbered block of a U-Net."""

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    conv_ranks: tuple[int, ...]
    conv_alphas: tuple[float, ...]


@dataclass(frozen=True)
class LrFactors:
    """Learning rate factors, one per numbered block. A block with factor 0 is not trained."""

    layout: BlockList
    factors: tuple[float, ...]

    def of(self, path: str) -> tuple[float, int | None]:
        """Return the factor of a module and its block; (1, None) outside all blocks."""
        block = self.layout.index_of(path)
        return (1.0, None) if block is None else (self.factors[block], block)


@dataclass(frozen=True)
class Rules:
    """Rules for ranks, alphas and learning rates in one part of the base model."""

    rank: int
    alpha: float
    conv_rank: int
    conv_alpha: float
    searches_conv_blocks: bool
    layout: BlockList | None
    blocks: BlockTable | None
    lr_factors: LrFactors | None
    choices: Choices | None
    ranks_by_expression: Expressions[int]
    rates_by_expression: Expressions[float]

    def classes(self, part: Part) -> tuple[str, ...]:
        """Return the class names of the blocks to search."""
        return part.blocks + (part.conv_blocks if self.searches_conv_blocks else ())

    def resolve_settings(self, target: TargetModule) -> TargetSettings:
        """Return the settings of one module. In a block with learning rate factor 0 its rank is 0."""
        return self.with_rate(target, *self._rank_and_alpha(target))

    def with_rate(self, target: TargetModule, rank: int, alpha: float) -> TargetSettings:
        """Return the settings of a module with a known rank and alpha."""
        expression, lr = self.rates_by_expression.find(target) or (None, None)
        factor, block = (1.0, None) if self.lr_factors is None else self.lr_factors.of(target.path)
        return TargetSettings(rank if factor else 0, alpha, factor, block, lr, expression)

    def resolve_norm_settings(self, target: TargetModule) -> TargetSettings | None:
        """Return the settings of a normalisation layer, or None if its block is skipped."""
        block = self.layout.index_of(target.path) if self.layout else None
        if self.blocks is not None and block is not None and not self.blocks.ranks[block]:
            return None
        settings = self.with_rate(target, 0, 0.0)
        return settings if settings.lr_factor else None

    def _rank_and_alpha(self, target: TargetModule) -> tuple[int, float]:
        if (matched := self.ranks_by_expression.find(target)) is not None:
            return matched[1], self.alpha
        rank, alpha = self._by_size_and_block(target)
        if self.choices is None:
            return rank, alpha
        chosen_rank = self.choices.rank_of(target, rank)
        return chosen_rank, alpha if chosen_rank == rank else self.alpha

    def _by_size_and_block(self, target: TargetModule) -> tuple[int, float]:
        block = self.layout.index_of(target.path) if self.layout and self.blocks else None
        if self.blocks is None or block is None:
            return (self.rank, self.alpha) if target.kind == "plain" else (self.conv_rank, self.conv_alpha)
        if target.kind == "plain":
            return self.blocks.ranks[block], self.blocks.alphas[block]
        return self.blocks.conv_ranks[block], self.blocks.conv_alphas[block]


def make_rules(
    rank: int, alpha: float, arguments: NetworkArguments, targets: AdapterTargets, is_denoiser: bool
) -> Rules:
    """Make the rules of the denoiser or of a text encoder. Arguments about blocks apply to the denoiser only.

    Raises UserError if a list does not fit the blocks of the base model.
    """
    layout = targets.block_list
    ranks, rates = arguments.of(RankArguments), arguments.of(RateArguments)
    conv_alpha = DEFAULT_CONV_ALPHA if ranks.conv_alpha is None else ranks.conv_alpha
    return Rules(
        rank=rank,
        alpha=alpha,
        conv_rank=ranks.conv_dim or 0,
        conv_alpha=conv_alpha,
        # conv_dim=0 adapts no larger kernel, but the Linear layers and 1x1 convolutions of these blocks.
        searches_conv_blocks=ranks.conv_dim is not None or ranks.conv_block_dims is not None,
        layout=layout if is_denoiser else None,
        blocks=make_block_table(rank, alpha, conv_alpha, arguments, layout) if is_denoiser else None,
        lr_factors=make_lr_factors(arguments, layout) if is_denoiser else None,
        choices=Choices(targets, arguments) if is_denoiser else None,
        ranks_by_expression=Expressions(ranks.network_reg_dims or (), targets),
        rates_by_expression=Expressions(rates.network_reg_lrs or (), targets),
    )


def make_block_table(
    rank: int, alpha: float, conv_alpha: float, arguments: NetworkArguments, layout: BlockList | None
) -> BlockTable | None:
    """Return ranks and alphas per block, or None if no argument refers to blocks."""
    ranks = arguments.of(RankArguments)
    if ranks.block_dims is None and not _factor_lists(arguments):
        return None
    num_blocks = len(_needed(layout, arguments).patterns)

    def full(name: str, values: Sequence[float] | None, otherwise: float) -> tuple[float, ...]:
        if values is None:
            return (otherwise,) * num_blocks
        if len(values) != num_blocks:
            raise error_in(f"--network_args {name}")(
                f"--network_args {name} has {len(values)} entries; this base model needs {num_blocks}, one per block: "
                f"{describe_blocks(_needed(layout, arguments))}"
            )
        return tuple(values)

    return BlockTable(
        ranks=tuple(int(r) for r in full("block_dims", ranks.block_dims, rank)),
        alphas=full("block_alphas", ranks.block_alphas, alpha),
        conv_ranks=tuple(int(r) for r in full("conv_block_dims", ranks.conv_block_dims, ranks.conv_dim or 0)),
        conv_alphas=full("conv_block_alphas", ranks.conv_block_alphas, conv_alpha),
    )


def make_lr_factors(arguments: NetworkArguments, layout: BlockList | None) -> LrFactors | None:
    """Return the factors of the three *_lr_weight lists, or None. Factors up to block_lr_zero_threshold become 0."""
    if not _factor_lists(arguments):
        return None
    layout, rates = _needed(layout, arguments), arguments.of(RateArguments)
    pad = (1.0,) * layout.padding
    factors = (
        *pad,
        *_side("down_lr_weight", rates.down_lr_weight, layout.down),
        *_side("mid_lr_weight", rates.mid_lr_weight, layout.mid),
        *_side("up_lr_weight", rates.up_lr_weight, layout.up),
        *pad,
    )
    return LrFactors(layout, tuple(f if f > rates.block_lr_zero_threshold else 0.0 for f in factors))


def preset_factors(preset: LrPreset, num_blocks: int) -> tuple[float, ...]:
    """Return the factor of each block from a curve plus its offset.

    cosine falls from 1, sine rises from 0, linear and reverse_linear are straight, zeros is 0.
    """
    last = max(num_blocks - 1, 1)
    curve = LR_CURVES[preset.name]
    return tuple(curve(i / last) + preset.offset for i in range(num_blocks))


def describe_blocks(layout: BlockList) -> str:
    """Describe the numbered blocks and the patterns of their modules."""
    return "; ".join(f"{i}: {pattern or 'nothing'}" for i, pattern in enumerate(layout.patterns))


def _factor_lists(arguments: NetworkArguments) -> list[str]:
    """Return the names of the given *_lr_weight lists."""
    return [name for name in LR_LISTS if name in arguments.given]


def _needed(layout: BlockList | None, arguments: NetworkArguments) -> BlockList:
    if layout is None:
        names = [*(["block_dims"] if "block_dims" in arguments.given else []), *_factor_lists(arguments)]
        raise about("--network_args")(f"{', '.join(names)}: this base model has no numbered blocks", "leave it out")
    return layout


def _side(name: str, weights: LrWeights | None, num_blocks: int) -> tuple[float, ...]:
    """Return the factors of one side. A list that is too short is padded with 1.

    For down and up one number applies to all blocks, which sd-scripts does not support. For the middle it is a short
    list.
    """
    if weights is None:
        return (1.0,) * num_blocks
    if isinstance(weights, LrPreset):
        return preset_factors(weights, num_blocks)
    if any(weight != 1 for weight in weights[num_blocks:]):
        raise error_in(f"--network_args {name}")(
            f"--network_args {name} has {len(weights)} entries; there are {num_blocks} such blocks here"
        )
    if len(weights) > num_blocks:  # front ends send twelve entries for all base models
        logger.warning(
            "--network_args %s has %d entries, of which the first %d count: there are no more such blocks here",
            name, len(weights), num_blocks,
        )  # fmt: skip
        weights = weights[:num_blocks]
    if len(weights) == 1 and name != "mid_lr_weight":
        return weights * num_blocks
    return weights + (1.0,) * (num_blocks - len(weights))
