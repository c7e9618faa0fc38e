"""The adapters of a sweep: their labels, and the options of each."""

import logging
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

from library.errors import UserError
from library.options.base import Options
from library.options.dataset import DatasetOptions
from library.options.no_effect import find_unused, is_set
from library.options.ranges import check_number
from library.options.train import TrainOptions
from library.options.training.loss import LossOptions
from library.options.training.network import NetworkOptions
from library.options.training.noise import NoiseOptions
from library.suggestions import did_you_mean
from library.training.sweep.strength import (
    ALPHA_NAMES,
    Strength,
    describe_strengths,
    find_kept_strengths,
    is_alpha_strength,
    varied_ranks,
)

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=TrainOptions)

NEAR = 0.9  # similarity of a misspelt option name; the nearest network argument, network_reg_dims, has 0.81
TABLES = ("network_args", "optimizer_args", "lr_scheduler_args")  # have sweepable keys; the first needs no prefix
MOST_ADAPTERS = 1000  # each has its own files and log line
NONE = "none"  # value of an option that is not given
FORM = "write OPTION=A,B, such as learning_rate=1e-4,2e-4; A|B where values have commas in them"
OF_DATA = "it changes the images, and all adapters see the same batches; train one run after the other"
OF_LOSS = "it changes what the losses mean, so that adapters could not be compared; train one run after the other"
OF_ALL = "all adapters share it with the base model and the run; train one run after the other"


@dataclass(frozen=True)
class Combination(Generic[OptionsT]):
    """One adapter of a sweep."""

    label: str  # for example lr1e-4-dim8
    chosen: Mapping[str, str]  # option name -> value, both as typed
    options: OptionsT  # of this adapter alone


def split_options(options: OptionsT) -> tuple[OptionsT, dict[str, OptionsT]]:
    """Split options into those shared by all adapters and those of each adapter, by label.

    A run without a sweep has one adapter with label "". Shared options have the first adapter's values. Raises
    UserError for an invalid sweep.
    """
    if not options.sweep.sweep:
        return options, {"": options}
    combinations = expand_combinations(options)
    logger.info(
        "--sweep: %d adapters in one run: %s",
        len(combinations),
        ", ".join(combination.label for combination in combinations),
    )
    swept = dict(parse_word(item, options) for item in options.sweep.sweep)
    adapters = [(c.options.network, varied_ranks(options.network, swept, c.chosen)) for c in combinations]
    for line in describe_strengths(adapters, find_kept_strengths(options.network, swept), swept):
        logger.info("%s", line)
    values = options.flat()
    # These belong to the run, not to its first adapter.
    of_all = {name: values[name] for name in ("sweep", "output_name", "seed", "log_events")}
    return combinations[0].options.with_values(of_all), {
        combination.label: combination.options for combination in combinations
    }


def expand_combinations(options: OptionsT) -> list[Combination[OptionsT]]:
    """Return every combination of the swept values; the last option varies fastest.

    Raises UserError for an option that cannot be swept, an invalid value, and labels that clash.
    """
    swept = [parse_word(item, options) for item in options.sweep.sweep or ()]
    short_names = sweep_names(type(options))
    names = [name for name, _ in swept]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--sweep names {repeated} twice; give all of its values in one word")
    # Counted before they are listed, because a few options with many values each make millions.
    num_adapters = prod(len(texts) for _, texts in swept)
    if num_adapters > MOST_ADAPTERS:
        raise UserError(f"--sweep names {num_adapters} adapters; at most {MOST_ADAPTERS} can be trained in one run")
    warn_of_replaced(options, names)
    words, combinations = dict(swept), []
    strengths = find_kept_strengths(options.network, words)
    for texts in product(*(texts for _, texts in swept)):
        chosen = dict(zip(names, texts, strict=True))
        label = "-".join(
            # optimizer_args.weight_decay is weightdecay
            f"{short_names.get(name, name.rpartition('.')[2].replace('_', ''))}{short_value(text)}"
            for name, text in chosen.items()
        )
        ranks = varied_ranks(options.network, words, chosen)
        combinations.append(Combination(label, chosen, resolve_adapter(options, chosen, label, ranks, strengths)))
    if len(combinations) < 2:
        raise UserError(f"--sweep {' '.join(options.sweep.sweep or ())} names a single adapter; give it two or more")
    labels = [
        combination.label.casefold() for combination in combinations
    ]  # file names ignore case on Windows and macOS
    if clash := next(
        (combination.label for combination in combinations if labels.count(combination.label.casefold()) > 1), None
    ):
        raise UserError(
            f"--sweep: two adapters would have the name {clash}; give values whose names differ in more than case"
        )
    return combinations


def parse_word(item: str, options: Options) -> tuple[str, list[str]]:
    """Split `name=a,b` into (name, values). Raises UserError for an option that cannot be swept."""
    name, equals, text = item.partition("=")
    name = name.strip().removeprefix("--")
    texts = [value.strip() for value in text.split("|" if "|" in text else ",")]
    if not equals or not name or not all(texts):
        raise UserError(f"--sweep {item!r}: {FORM}")
    if repeated := next((value for value in texts if texts.count(value) > 1), None):
        raise UserError(f"--sweep {name}: {repeated} appears twice; list each value once")
    swept = sweep_names(type(options))
    if name in swept or (name.partition(".")[0] in TABLES and "." in name):
        return name, texts
    if name in options.flat():
        raise UserError(f"--sweep {name}: {explain_refusal(name)}")
    if hint := did_you_mean(name, swept, NEAR):
        raise UserError(f"--sweep {name}: there is no such option{hint}")
    return f"{TABLES[0]}.{name}", texts  # the network module checks it


def explain_refusal(name: str) -> str:
    """Say why an option cannot differ between the adapters of a run."""
    if name in TABLES:
        return f"sweep one of its keys, such as {name}.KEY=A,B"
    if name in DatasetOptions.defaults():
        return OF_DATA
    return OF_LOSS if name in {**LossOptions.defaults(), **NoiseOptions.defaults()} else OF_ALL


def warn_of_replaced(options: Options, names: Sequence[str]) -> None:
    values, defaults = options.flat(), type(options).defaults()
    for name in names:
        table, _, key = name.partition(".")
        if key:
            is_given = any(item.partition("=")[0] == key for item in values[table] or ())
        else:  # the seed still sets the order of images, and the module must be named
            is_given = name not in ("seed", "network_module") and is_set(values[name], defaults[name])
        if is_given and ALPHA_NAMES.get(name, name) in names:  # otherwise alpha belongs to the given rank
            logger.warning("--%s has no effect: --sweep gives every adapter its own", f"{table} {key}" if key else name)


def sweep_names(kind: type[Options]) -> dict[str, str]:
    """Return the options that can be swept, each with its short name for labels."""
    return {
        name: declared.sweep_name for name, declared in kind.declarations().items() if declared.sweep_name is not None
    }


def short_value(text: str) -> str:
    """Shorten a value for labels: the last part of a path or of a dotted name."""
    text = Path(text).stem if "/" in text or "\\" in text or text.endswith(".safetensors") else text
    is_number = re.fullmatch(r"[-+\d.e%, ]+", text) is not None
    return re.sub(r"[^\w.+-]+", "_", (text if is_number else text.rpartition(".")[2]).replace("%", "pct"))


def resolve_adapter(
    options: OptionsT,
    chosen: Mapping[str, str],
    label: str,
    ranks: Mapping[str, str],
    strengths: Sequence[Strength],
) -> OptionsT:
    """Return the options of one adapter; `ranks` are its `varied_ranks`.

    Raises UserError for a value that is invalid or has no effect.
    """
    values = options.flat()
    overrides: dict[str, Any] = {
        "sweep": None,
        "output_name": "-".join(filter(None, (options.saving.output_name, label))),
    }
    for name, text in {**chosen, **ranks}.items():
        table, _, key = name.partition(".")
        if key:
            other_arguments = [
                item for item in overrides.get(table, values[table]) or () if item.partition("=")[0] != key
            ]
            overrides[table] = [*other_arguments, *([] if text == NONE else [f"{key}={text}"])]
        else:
            overrides[name] = parse_value(type(options), name, text)
    # Every adapter has an event stream of its own, which one file cannot hold.
    if options.reports.log_events:
        path = Path(options.reports.log_events)
        overrides["log_events"] = str(path.with_name(f"{path.stem}-{label}{path.suffix}"))
    resolved = options.with_values(overrides)
    if is_alpha_strength(resolved.network):
        for strength in strengths:
            if strength.rank_name in ranks:
                resolved = resolved.with_values(strength.as_option(resolved.network, ranks[strength.rank_name]))
    for line in find_idle_words(resolved, resolved.network, chosen):
        raise UserError(f"--sweep {line}")
    return resolved


def parse_value(kind: type[Options], name: str, text: str) -> Any:
    """Parse an option's value as the command line does."""
    declared = kind.declarations()[name]
    if text.lower() == NONE and declared.default is None:
        return None
    read = declared.kind.parse
    try:
        value = [read(part) for part in text.split()] if declared.nargs else read(text)
    except (ValueError, ArgumentTypeError) as error:
        raise UserError(f"--sweep {name}: {text!r} is no value of --{name}: {error}") from error
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float):
            check_number(name, number, declared)
    return value


def find_idle_words(options: Options, network: NetworkOptions, chosen: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for every word that makes no difference between adapters."""
    for line in find_unused(options, {}):
        name = line.partition(" ")[0].removeprefix("--")
        if name in chosen:
            yield line.removeprefix("--")
    has_own = network.unet_lr is not None or network.network_train_text_encoder_only
    if "learning_rate" in chosen and has_own and (network.text_encoder_lr or network.network_train_unet_only):
        yield "learning_rate has no effect with --unet_lr and --text_encoder_lr; sweep these"
