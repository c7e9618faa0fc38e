"""The runs of a sweep: their labels, and the options of each."""

import logging
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

from library.base.errors import about
from library.base.suggestions import did_you_mean
from library.options.base import Options
from library.options.caching import CachingOptions
from library.options.config_file import ConfigFileOptions
from library.options.kinds import BOOL
from library.options.machine.compiling import CompileOptions
from library.options.machine.distributed import DistributedOptions
from library.options.machine.fit import FitOptions
from library.options.machine.kernels import KernelOptions
from library.options.machine.memory import MemoryOptions
from library.options.no_effect import find_unused, is_set
from library.options.output.console import ConsoleOptions
from library.options.output.preview import PreviewOptions
from library.options.output.reports import ReportOptions
from library.options.output.saving import HubOptions, MetadataOptions, SavingOptions, StateOptions
from library.options.output.trackers import TrackerOptions
from library.options.ranges import check_number
from library.options.train import TrainOptions
from library.options.training.averaging import AveragingOptions
from library.options.training.flow import TimestepPreviewOptions
from library.options.training.network import NetworkOptions
from library.options.training.optimizer import OptimizerOptions, ScheduleOptions
from library.options.training.run import DiagnosticOptions, RunOptions
from library.options.training.sweep import SweepOptions
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
MOST_RUNS = 1000  # each has its own files
NEEDED = ("seed", "network_module", "pretrained_model_name_or_path", "resolution", "train_data_dir", "dataset_config")
NONE = "none"  # value of an option that is not given
FORM = "write OPTION=A,B, such as learning_rate=1e-4,2e-4; A|B where values have commas in them"

# What a run writes, where it starts and how it is launched cannot differ between runs that one command starts.
REFUSED = (
    ConsoleOptions, ConfigFileOptions, SweepOptions, SavingOptions, HubOptions, StateOptions, MetadataOptions,
    ReportOptions, TrackerOptions, PreviewOptions, DistributedOptions, DiagnosticOptions, TimestepPreviewOptions,
)  # fmt: skip
OF_BASE = ("base_weights", "base_weights_multiplier", "training_adapter")  # merged into the base, or beside it
LOOKS = ("debug_dataset", "audit_only")
# What changes neither the held-out images nor what their losses mean.
RANKED = (
    NetworkOptions, OptimizerOptions, ScheduleOptions, AveragingOptions, RunOptions, KernelOptions, MemoryOptions,
    CompileOptions, FitOptions, CachingOptions,
)  # fmt: skip


@dataclass(frozen=True)
class Combination(Generic[OptionsT]):
    """One run of a sweep."""

    label: str  # for example lr1e-4-dim8
    chosen: Mapping[str, str]  # option name -> value, both as typed
    options: OptionsT  # of this run alone


def expand_combinations(options: OptionsT) -> list[Combination[OptionsT]]:
    """Return every combination of the swept values; the last option varies fastest.

    Raises UserError for an option that cannot be swept, an invalid value, and labels that clash.
    """
    swept = [parse_word(item, options) for item in options.sweep.sweep or ()]
    labels_of = short_names(type(options))
    names = [name for name, _ in swept]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise about("--sweep")(f"names {repeated} twice", "give all of its values in one word")
    # Counted before they are listed, because a few options with many values each make millions.
    num_runs = prod(len(texts) for _, texts in swept)
    if num_runs > MOST_RUNS:
        raise about("--sweep")(f"names {num_runs} runs; at most {MOST_RUNS} can be trained by one command")
    warn_of_replaced(options, names)
    words, combinations = dict(swept), []
    strengths = find_kept_strengths(options.network, words)
    for texts in product(*(texts for _, texts in swept)):
        chosen = dict(zip(names, texts, strict=True))
        label = "-".join(f"{labels_of.get(name, squeeze(name))}{short_value(text)}" for name, text in chosen.items())
        ranks = varied_ranks(options.network, words, chosen)
        combinations.append(Combination(label, chosen, resolve_run_options(options, chosen, label, ranks, strengths)))
    if len(combinations) < 2:
        typed = " ".join(options.sweep.sweep or ())
        raise about("--sweep")(f"{typed} names a single run", "give it two values or more")
    labels = [
        combination.label.casefold() for combination in combinations
    ]  # file names ignore case on Windows and macOS
    if clash := next(
        (combination.label for combination in combinations if labels.count(combination.label.casefold()) > 1), None
    ):
        raise about("--sweep")(
            f": two runs would have the name {clash}", "give values whose names differ in more than case"
        )
    return combinations


def describe_sweep(
    network: NetworkOptions, swept: Mapping[str, Sequence[str]], combinations: Sequence[Combination[Any]]
) -> Iterator[str]:
    """Yield lines about the runs of a sweep of these words, and how their alphas follow their ranks."""
    yield f"--sweep: {len(combinations)} runs: {', '.join(combination.label for combination in combinations)}"
    adapters = [(c.options.network, varied_ranks(network, swept, c.chosen)) for c in combinations]
    yield from describe_strengths(adapters, find_kept_strengths(network, swept), swept)


def parse_word(item: str, options: Options) -> tuple[str, list[str]]:
    """Split `name=a,b` into (name, values). Raises UserError for an option that cannot be swept."""
    name, equals, text = item.partition("=")
    name = name.strip().removeprefix("--")
    texts = [value.strip() for value in text.split("|" if "|" in text else ",")]
    if not equals or not name or not all(texts):
        raise about("--sweep")(f"{item!r}: {FORM}")
    if repeated := next((value for value in texts if texts.count(value) > 1), None):
        raise about("--sweep")(f"{name}: {repeated} appears twice", "list each value once")
    swept = short_names(type(options))
    if name in swept or (name.partition(".")[0] in TABLES and "." in name):
        return name, texts
    if name in options.flat():
        raise about("--sweep")(f"{name}: {explain_refusal(name)}")
    if hint := did_you_mean(name, swept, NEAR):
        raise about("--sweep")(f"{name}: there is no such option{hint}")
    return f"{TABLES[0]}.{name}", texts  # the network module checks it


def explain_refusal(name: str) -> str:
    """Say why an option cannot differ between the runs of a sweep."""
    if name in TABLES:
        return f"sweep one of its keys, such as {name}.KEY=A,B"
    return "it says what a run writes, where it starts or how it is launched, which is the same for all runs"


def find_unranked(options: Options) -> list[str]:
    """Return the swept options that change the held-out images or what their losses mean."""
    ranked = {*TABLES, *(name for kind in RANKED for name in kind.defaults())} - {*OF_BASE}
    declarations = type(options).declarations()
    ranked |= {name for name, declared in declarations.items() if declared.on_resume == "new rate"}
    names = [parse_word(item, options)[0] for item in options.flat()["sweep"] or ()]
    return [name for name in names if name.partition(".")[0] not in ranked]


def digest_encoded(options: Options) -> str:
    """Return a digest of the options on which encoded images and captions may depend, and of the seed."""
    others = {name for kind in (*RANKED, *REFUSED) for name in kind.defaults()} - {"seed", *OF_BASE}
    values = {name: value for name, value in options.flat().items() if name not in others}
    return blake2b(repr(sorted(values.items())).encode(errors="surrogatepass"), digest_size=6).hexdigest()


def warn_of_replaced(options: Options, names: Sequence[str]) -> None:
    values, defaults = options.flat(), type(options).defaults()
    for name in names:
        table, _, key = name.partition(".")
        if key:
            is_given = any(item.partition("=")[0] == key for item in values[table] or ())
        else:  # the seed still sets the noise of validation, and the checks before the sweep need the others
            is_given = name not in NEEDED and is_set(values[name], defaults[name])
        if is_given and ALPHA_NAMES.get(name, name) in names:  # otherwise alpha belongs to the given rank
            logger.warning("--%s has no effect: --sweep gives every run its own", f"{table} {key}" if key else name)


def short_names(kind: type[Options]) -> dict[str, str]:
    """Return the options that can be swept, each with its short name for labels."""
    refused = {name for group in REFUSED for name in group.defaults()} | {*TABLES, *LOOKS}
    return {
        name: squeeze(name) if declared.short_name is None else declared.short_name
        for name, declared in kind.declarations().items()
        if name not in refused and declared.ignored is None and not declared.secret
    }


def squeeze(name: str) -> str:
    """Shorten a name for labels: optimizer_args.weight_decay is weightdecay."""
    return name.rpartition(".")[2].replace("_", "")


def short_value(text: str) -> str:
    """Shorten a value for labels: the last part of a path or of a dotted name."""
    text = Path(text).stem if "/" in text or "\\" in text or text.endswith(".safetensors") else text
    is_number = re.fullmatch(r"[-+\d.e%, ]+", text) is not None
    return re.sub(r"[^\w.+-]+", "_", (text if is_number else text.rpartition(".")[2]).replace("%", "pct"))


def resolve_run_options(
    options: OptionsT, chosen: Mapping[str, str], label: str, ranks: Mapping[str, str], strengths: Sequence[Strength]
) -> OptionsT:
    """Return the options of one run; `ranks` are its `varied_ranks`.

    Raises UserError for a value that is invalid or has no effect.
    """
    values = options.flat()
    overrides: dict[str, Any] = {
        **SweepOptions.defaults(),
        "skip_finished": True,
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
    # One file holds the events or the log of one run.
    for name in ("log_events", "console_log_file"):
        if values[name]:
            path = Path(values[name])
            overrides[name] = str(path.with_name(f"{path.stem}-{label}{path.suffix}"))
    chosen_values = values | overrides
    if is_alpha_strength(chosen_values["network_module"], chosen_values["network_args"]):
        for strength in strengths:
            if strength.rank_name in ranks:
                overrides |= strength.as_option(chosen_values["network_args"], ranks[strength.rank_name])
    resolved = options.with_values(overrides)
    for line in find_idle_words(resolved, resolved.network, chosen):
        raise about("--sweep")(f"{line}")
    return resolved


def parse_value(kind: type[Options], name: str, text: str) -> Any:
    """Parse an option's value as the command line does."""
    declared = kind.declarations()[name]
    if text.lower() == NONE and declared.default is None:
        return None
    read = read_switch if declared.kind is BOOL else declared.kind.parse
    try:
        value = [read(part) for part in split_words(text)] if declared.nargs else read(text)
    except (ValueError, ArgumentTypeError) as error:
        raise about("--sweep")(f"{name}: {text!r} is no value of --{name}: {error}") from error
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float):
            check_number(name, number, declared)
    return value


def read_switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("it is true or false")
    return text.lower() == "true"


def split_words(text: str) -> list[str]:
    """Split a list of values at its spaces, except for those in quotes."""
    return shlex.split(text) if re.search("[\"']", text) else text.split()


def find_idle_words(options: Options, network: NetworkOptions, chosen: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for every word that makes no difference between runs."""
    for line in find_unused(options, {}):
        name = line.partition(" ")[0].removeprefix("--")
        if name in chosen:
            yield line.removeprefix("--")
    has_own = network.unet_lr is not None or network.network_train_text_encoder_only
    if "learning_rate" in chosen and has_own and (network.text_encoder_lr or network.network_train_unet_only):
        yield "learning_rate has no effect with --unet_lr and --text_encoder_lr; sweep these"
