"""`--network_args "key=value"` as typed values; every key that this project knows stands in one table."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from library.checkpoints.base_model_spec import ArgumentForm
from library.errors import UserError
from library.suggestions import nearest_name
from networks.core.arguments.values import (
    LrWeights,
    parse_bool,
    parse_embedder_ranks,
    parse_expression_ranks,
    parse_expression_rates,
    parse_factor,
    parse_init,
    parse_lr_weights,
    parse_number,
    parse_numbers,
    parse_patterns,
    parse_power,
    parse_probability,
    parse_rank,
    parse_ranks,
    parse_selection,
    parse_unit,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkArguments:
    """The network arguments of one adapter; None is an argument that was not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: LrWeights | None = None
    mid_lr_weight: LrWeights | None = None
    up_lr_weight: LrWeights | None = None
    block_lr_zero_threshold: float = 0.0
    neuron_dropout: float = 0.0  # --network_dropout; LyCORIS calls it `dropout`
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_tucker: bool = False
    use_scalar: bool = False
    train_norm: bool = False
    dora_wd: bool = False
    dora_constant_norm: bool = False  # the norm of DoRA is left out of the backward pass
    wd_on_output: bool = False  # DoRA with one magnitude per output in place of one per input
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    unit: int = 1  # networks.dylora: ranks are trained in blocks of so many; `dyloRA` is the same
    conv_unit: int = 1  # the same for convolutions larger than 1x1
    train_all_ranks: bool = True
    factor: int | None = (
        None  # networks.lokr: a side of the small matrix; -1, as if not given, for the nearest to a square
    )
    block_size: int | None = None  # networks.oft_v2, networks.boft: of the blocks that turn, before --network_dim
    coft: bool = False  # networks.oft_v2: angles are limited
    coft_eps: float = 6e-5  # to this length of all blocks
    block_share: bool = False  # networks.oft_v2: all inputs of a layer share one block
    block_num: int = 0  # networks.boft: how many blocks, in place of their size
    boft_n_butterfly_factor: int = 1  # networks.boft: how many factors turn one after the other
    enable_conv: bool = False  # networks.oft, oft_v2 and boft: kernels larger than 1x1, without a size of their own
    enable_all_linear: bool = False  # networks.oft: all layers of the blocks, not those of attention alone
    auto_adjust: bool = True  # networks.oft_v2, networks.boft: the nearest size where one does not divide a layer
    decompose_both: bool = False  # networks.lokr: the small matrix is a product too, where it is large enough
    full_matrix: bool = False  # networks.lokr: neither matrix is a product
    init: str | None = None  # where the factors of a LoRA start; None for up at zero and down at random
    rslora: bool = False  # alpha / sqrt(rank) in place of alpha / rank
    ggpo_sigma: float | None = None  # GGPO: noise on weights in training, by the norms of rows
    ggpo_beta: float | None = None  # and by those of their gradients
    tlora: bool = False  # T-LoRA: the noisier a sample, the fewer ranks act on it; networks.tlora has it on
    tlora_min_rank: int = 1  # the ranks that act on pure noise
    tlora_power: float = 1.0  # of the share of the signal that the ranks follow; 1 is linear
    split_qkv: bool = False  # q, k and v, which some base models have in one layer, are adapted apart
    network_reg_dims: tuple[tuple[str, int], ...] | None = None  # (regular expression, rank); the first that fits
    network_reg_lrs: tuple[tuple[str, float], ...] | None = None  # (regular expression, learning rate)
    exclude_patterns: tuple[str, ...] = ()  # of whole module paths that are left alone
    include_patterns: tuple[str, ...] = ()  # of whole module paths that are adapted although they are excluded
    only_patterns: tuple[str, ...] = ()  # include_patterns of kinds for which they mean that nothing else is adapted
    verbose: bool = False  # list the modules at start
    of_model: Mapping[str, Any] = field(default_factory=dict)  # those that AdapterTargets give a meaning to, if given

    @property
    def draws(self) -> bool:
        """Whether adapters leave something out at random, or add noise, while they train."""
        return bool(self.neuron_dropout or self.rank_dropout or self.module_dropout or self.perturbs)

    @property
    def perturbs(self) -> bool:
        """Whether GGPO is on, which takes both of its arguments."""
        is_given = self.ggpo_sigma is not None and self.ggpo_beta is not None
        return is_given and bool(self.ggpo_sigma or self.ggpo_beta)


Parse = Callable[[str], Any]

SUPPORTED: Mapping[str, Parse] = {
    "conv_dim": parse_rank,
    "conv_alpha": parse_number,
    "block_dims": parse_ranks,
    "block_alphas": parse_numbers,
    "conv_block_dims": parse_ranks,
    "conv_block_alphas": parse_numbers,
    "down_lr_weight": parse_lr_weights,
    "mid_lr_weight": parse_lr_weights,
    "up_lr_weight": parse_lr_weights,
    "block_lr_zero_threshold": parse_number,
    "neuron_dropout": parse_probability,
    "rank_dropout": parse_probability,
    "module_dropout": parse_probability,
    "use_tucker": parse_bool,
    "use_scalar": parse_bool,
    "train_norm": parse_bool,
    "dora_wd": parse_bool,
    "dora_constant_norm": parse_bool,
    "wd_on_output": parse_bool,
    "loraplus_lr_ratio": parse_number,
    "loraplus_unet_lr_ratio": parse_number,
    "loraplus_text_encoder_lr_ratio": parse_number,
    "unit": parse_unit,
    "conv_unit": parse_unit,
    "train_all_ranks": parse_bool,
    "factor": parse_factor,
    "block_size": parse_unit,
    "coft": parse_bool,
    "coft_eps": parse_number,
    "block_share": parse_bool,
    "block_num": parse_rank,
    "boft_n_butterfly_factor": parse_unit,
    "enable_conv": parse_bool,
    "enable_all_linear": parse_bool,
    "auto_adjust": parse_bool,
    "decompose_both": parse_bool,
    "full_matrix": parse_bool,
    "init": parse_init,
    "rslora": parse_bool,
    "ggpo_sigma": parse_number,
    "ggpo_beta": parse_number,
    "tlora": parse_bool,
    "tlora_min_rank": parse_unit,
    "tlora_power": parse_power,
    "split_qkv": parse_bool,
    "network_reg_dims": parse_expression_ranks,
    "network_reg_lrs": parse_expression_rates,
    "exclude_patterns": parse_patterns,
    "include_patterns": parse_patterns,
    "verbose": parse_bool,
}

OF_MODELS: Mapping[ArgumentForm, Parse] = {  # what base models have besides; AdapterTargets say which
    "rank": parse_rank,
    "ranks": parse_embedder_ranks,
    "blocks": parse_selection,
    "flag": parse_bool,
    "word": str,
}

SYNONYMS: Mapping[str, str] = {  # another spelling -> the argument
    "dyloRA": "unit",
    "rs_lora": "rslora",
    "wd_on_out": "wd_on_output",
    "oft_block_size": "block_size",
    "boft_block_size": "block_size",
    "boft_block_num": "block_num",
    "oft_coft": "coft",
    "oft_block_share": "block_share",
}
DROPOUTS = ("dropout", "dropout_probability", "boft_dropout")  # in --network_args, for --network_dropout


def parse_arguments(
    items: Mapping[str, Any],
    neuron_dropout: float | None = None,
    of_models: Mapping[str, ArgumentForm] = MappingProxyType({}),
) -> NetworkArguments:
    """Read the network arguments that a user gave; None stands for one that was not given.

    `of_models` are those that base models have of their own. `dropout` is LyCORIS's name for --network_dropout and
    `dropout_probability` and `boft_dropout` those of OFT and BOFT: all mean the same here. Raises UserError naming the
    argument for an unknown key and a value of the wrong form.
    """
    given = {key: value for key, value in items.items() if value is not None}
    dropouts = {name: given.pop(name) for name in DROPOUTS if name in given}
    for name, dropout in dropouts.items():
        chosen = dropout if neuron_dropout is None else neuron_dropout
        if float(dropout) != float(given.setdefault("neuron_dropout", chosen)):
            other = "--network_dropout" if neuron_dropout is not None else DROPOUTS[0]
            raise UserError(
                f"{other} is {given['neuron_dropout']} but --network_args says {name}={dropout}; they mean the same, "
                "give one of them"
            )
    if neuron_dropout is not None:
        given["neuron_dropout"] = neuron_dropout
    parsers = {**{name: OF_MODELS[form] for name, form in of_models.items()}, **SUPPORTED}
    parsed = {key: _parse(key, value, parsers) for key, value in given.items()}
    of_model = {key: value for key, value in parsed.items() if key in of_models}
    own = {key: value for key, value in parsed.items() if key not in of_models}
    arguments = NetworkArguments(**_merge_synonyms(own), of_model=of_model)
    _check_together(arguments)
    return arguments


def _parse(key: str, value: Any, parsers: Mapping[str, Parse]) -> Any:
    name = SYNONYMS.get(key, key)
    if name not in parsers:
        near = nearest_name(key, (*parsers, *SYNONYMS), least=0.5)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(SUPPORTED)}"
        raise UserError(f"--network_args {key}={value}: there is no argument {key}; {hint}")
    is_list = isinstance(value, (list, tuple)) and not name.endswith("_patterns")
    text = ",".join(map(str, value)) if is_list else str(value)
    try:
        return parsers[name](text)
    except ValueError as error:
        flag = "--network_dropout" if key == "neuron_dropout" else f"--network_args {key}"
        raise UserError(f"{flag}={text}: {error}") from None


def _merge_synonyms(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every argument under one name. Raises UserError where two spellings contradict each other."""
    merged = {key: value for key, value in values.items() if key not in SYNONYMS}
    for key, name in SYNONYMS.items():
        if key in values and merged.setdefault(name, values[key]) != values[key]:
            raise UserError(
                f"--network_args {key}={values[key]} and {name}={values[name]} mean the same and differ; "
                "give one of them"
            )
    return merged


def _check_together(arguments: NetworkArguments) -> None:
    """Arguments that say nothing without another one."""
    has_factors = any(
        weights is not None for weights in (arguments.down_lr_weight, arguments.mid_lr_weight, arguments.up_lr_weight)
    )
    in_blocks = arguments.block_dims is not None or has_factors
    if arguments.conv_block_dims is not None and not in_blocks:
        raise UserError(
            "--network_args conv_block_dims needs block_dims; give both, or conv_dim for one rank everywhere"
        )
    adapts_conv = arguments.conv_dim is not None or arguments.conv_block_dims is not None
    for name, needs, is_there in (
        ("conv_alpha", "conv_dim", adapts_conv),
        ("block_alphas", "block_dims or one of the *_lr_weight lists", in_blocks),
        ("conv_block_alphas", "block_dims with conv_block_dims or conv_dim", in_blocks and adapts_conv),
        ("block_lr_zero_threshold", "one of the *_lr_weight lists", has_factors),
        ("conv_unit", "conv_dim", adapts_conv),
        ("use_tucker", "conv_dim or conv_block_dims: it is for kernels larger than 1x1", adapts_conv),
        ("dora_constant_norm", "dora_wd", arguments.dora_wd),
        ("wd_on_output", "dora_wd", arguments.dora_wd),
        ("ggpo_sigma", "ggpo_beta", arguments.ggpo_beta is not None),
        ("ggpo_beta", "ggpo_sigma", arguments.ggpo_sigma is not None),
    ):
        if not is_there and getattr(arguments, name) != _default(name):
            logger.warning("--network_args %s has no effect without %s", name, needs)


def _default(name: str) -> Any:
    return next(one.default for one in fields(NetworkArguments) if one.name == name)
