"""`--network_args "key=value"` as typed values; every key that this project knows stands in one table."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

logger = logging.getLogger(__name__)

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")
LR_PRESETS = ("cosine", "sine", "linear", "reverse_linear", "zeros")


@dataclass(frozen=True)
class LrPreset:
    """A named curve of learning rate factors over the blocks of one side, raised by `offset`."""

    name: str
    offset: float = 0.0


LrWeights = tuple[float, ...] | LrPreset


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
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    unit: int = 1  # networks.dylora: ranks are trained in blocks of so many; `dyloRA` is the same
    conv_unit: int = 1  # the same for convolutions larger than 1x1
    train_all_ranks: bool = True


def parse_bool(text: str) -> bool:
    """True or False from any usual spelling."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError(f"expected True or False, one of {', '.join(TRUE_WORDS + FALSE_WORDS)}")


def parse_rank(text: str) -> int:
    """A rank: a whole number from 0, where 0 leaves the module alone."""
    try:
        rank = int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None
    if rank < 0:
        raise ValueError("expected 0 or more")
    return rank


def parse_unit(text: str) -> int:
    """A block size: a whole number from 1."""
    if (unit := parse_rank(text)) == 0:
        raise ValueError("expected 1 or more")
    return unit


def parse_number(text: str) -> float:
    """A finite number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        raise ValueError("expected a number") from None
    if not 0 <= number < float("inf"):
        raise ValueError("expected a number from 0")
    return number


def parse_probability(text: str) -> float:
    """A chance from 0 up to, but without, 1: at 1 nothing would be trained."""
    number = parse_number(text)
    if number >= 1:
        raise ValueError("expected a chance from 0 to below 1")
    return number


def parse_ranks(text: str) -> tuple[int, ...]:
    """Ranks with commas between them; an empty place is 0."""
    return tuple(parse_rank(item or "0") for item in text.replace(" ", "").split(","))


def parse_numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them; an empty place is 0."""
    return tuple(parse_number(item or "0") for item in text.replace(" ", "").split(","))


def parse_lr_weights(text: str) -> LrWeights:
    """Learning rate factors with commas between them, or a curve such as `cosine` or `sine+0.25`."""
    name, plus, offset = text.replace(" ", "").partition("+")
    if name in LR_PRESETS:
        return LrPreset(name, parse_number(offset) if plus else 0.0)
    try:
        return parse_numbers(text)
    except ValueError:
        raise ValueError(f"expected numbers with commas between them, or one of {', '.join(LR_PRESETS)}") from None


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
    "loraplus_lr_ratio": parse_number,
    "loraplus_unet_lr_ratio": parse_number,
    "loraplus_text_encoder_lr_ratio": parse_number,
    "unit": parse_unit,
    "conv_unit": parse_unit,
    "train_all_ranks": parse_bool,
}

SYNONYMS: Mapping[str, str] = {"dyloRA": "unit"}  # another spelling -> the argument

PLANNED: Mapping[str, str] = {  # key -> what it belongs to
    "split_qkv": "separate adapters for q, k and v",
    "train_t5xxl": "the T5 text encoder",
    "network_reg_dims": "ranks by regular expression",
    "network_reg_lrs": "learning rates by regular expression",
    "ggpo_sigma": "GGPO",
    "ggpo_beta": "GGPO",
    "verbose": "lists of modules at start",
    "include_patterns": "patterns of modules",
    "exclude_patterns": "patterns of modules",
    "train_llm_adapter": "Anima",
    "train_blocks": "choice of blocks",
    "train_block_indices": "choice of blocks",
    "train_double_block_indices": "FLUX.1",
    "train_single_block_indices": "FLUX.1",
    "in_dims": "FLUX.1",
    "img_attn_dim": "FLUX.1",
    "txt_attn_dim": "FLUX.1",
    "img_mlp_dim": "FLUX.1",
    "txt_mlp_dim": "FLUX.1",
    "img_mod_dim": "FLUX.1",
    "txt_mod_dim": "FLUX.1",
    "single_dim": "FLUX.1",
    "single_mod_dim": "FLUX.1",
    "emb_dims": "Stable Diffusion 3",
    "context_attn_dim": "Stable Diffusion 3",
    "context_mlp_dim": "Stable Diffusion 3",
    "context_mod_dim": "Stable Diffusion 3",
    "x_attn_dim": "Stable Diffusion 3",
    "x_mlp_dim": "Stable Diffusion 3",
    "x_mod_dim": "Stable Diffusion 3",
    "attn_dim": "Lumina Image 2.0",
    "mlp_dim": "Lumina Image 2.0",
    "mod_dim": "Lumina Image 2.0",
    "refiner_dim": "Lumina Image 2.0",
    "embedder_dims": "Lumina Image 2.0",
}


def parse_arguments(items: Mapping[str, Any], neuron_dropout: float | None = None) -> NetworkArguments:
    """Read the network arguments that a user gave; None stands for one that was not given.

    `dropout` is LyCORIS's name for --network_dropout and means the same here. Raises ValueError naming the argument
    for an unknown key, a value of the wrong form, and a feature that is not there yet.
    """
    given = {key: value for key, value in items.items() if value is not None}
    dropout = given.pop("dropout", None)
    if neuron_dropout is not None and dropout is not None and float(dropout) != float(neuron_dropout):
        raise ValueError(
            f"--network_dropout is {neuron_dropout} but --network_args says dropout={dropout}; they mean the same, "
            "give one of them"
        )
    if (chosen := neuron_dropout if neuron_dropout is not None else dropout) is not None:
        given["neuron_dropout"] = chosen
    arguments = NetworkArguments(**_merge_synonyms({key: _parse(key, value) for key, value in given.items()}))
    _check_together(arguments)
    return arguments


def _parse(key: str, value: Any) -> Any:
    if key in PLANNED:
        raise ValueError(f"--network_args {key}={value} is not supported yet ({PLANNED[key]}); leave {key} out")
    name = SYNONYMS.get(key, key)
    if name not in SUPPORTED:
        near = get_close_matches(key, [*SUPPORTED, *SYNONYMS, *PLANNED], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SUPPORTED)}"
        raise ValueError(f"--network_args {key}={value}: there is no argument {key}; {hint}")
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    try:
        return SUPPORTED[name](text)
    except ValueError as error:
        flag = "--network_dropout" if key == "neuron_dropout" else f"--network_args {key}"
        raise ValueError(f"{flag}={text}: {error}") from None


def _merge_synonyms(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every argument under one name. Raises ValueError where two spellings contradict each other."""
    merged = {key: value for key, value in values.items() if key not in SYNONYMS}
    for key, name in SYNONYMS.items():
        if key in values and merged.setdefault(name, values[key]) != values[key]:
            raise ValueError(
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
        raise ValueError(
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
    ):
        if not is_there and getattr(arguments, name) != _default(name):
            logger.warning("--network_args %s has no effect without %s", name, needs)


def _default(name: str) -> Any:
    return next(field.default for field in fields(NetworkArguments) if field.name == name)
