"""The command line: one flat parser, and the config file beneath it."""

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from library.options.base import Options
from library.options.leco import ignored_by_leco, refused_by_leco
from library.options.output.console import ConsoleOptions
from library.options.train import TrainOptions
from library.training.command_line.console import setup_logging
from library.training.command_line.help import EXAMPLES, EXAMPLES_OF_PROMPTS, TrainingParser
from library.training.command_line.recipes import read_recipe
from library.training.config_file import (
    SECRETS,
    Config,
    ConfigFileError,
    config_path,
    nearest,
    read_config,
    read_values,
    write_config,
)

logger = logging.getLogger(__name__)


def build_parser(
    *groups: type[Options],
    parts: str = "",
    elsewhere: Callable[[str], str] = lambda option: "",
    examples: str = EXAMPLES,
    left_out: Collection[str] = (),
) -> argparse.ArgumentParser:
    """Return a parser with the options of all groups: no positionals, nothing required, prefixes of flags accepted.

    `parts` are the options that name the files of a base model besides its first, for the `examples` in the help,
    which does not show the options `left_out`; `elsewhere` says what there is to say of an option that only other
    scripts have.
    """
    facts = {name: facts for kind in groups for name, facts in kind.facts().items()}
    usual = frozenset(name for name in facts if facts[name].usual)
    own = frozenset(name for name in facts if facts[name].own)
    parser = TrainingParser(usual, parts, own, elsewhere, examples, frozenset(left_out))
    for kind in groups:
        kind.add_to(parser)
    return parser


def build_parser_of_prompts(kind: type[TrainOptions], elsewhere: Callable[[str], str]) -> argparse.ArgumentParser:
    """Return the parser of a script that trains on prompts alone; what has no effect then is parsed and not shown."""
    left_out = {*ignored_by_leco(kind), *refused_by_leco(kind)}
    return build_parser(kind, elsewhere=elsewhere, examples=EXAMPLES_OF_PROMPTS, left_out=left_out)


def add_missing(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Declare those options of a class on a parser that it lacks."""
    for action in build_parser(kind)._actions:
        if not parser._option_string_actions.keys() & set(action.option_strings):
            parser._add_action(action)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv` (the process's own arguments where None); it wins over the config file, and that over the recipe.

    Sets up logging, so that what there is to say about the file goes where the user wants it. Ends the process with
    status 2 for a bad option, 1 for a bad config file, and 0 once it has written a config file.
    """
    typed = parse_words(parser, argv)
    if typed.output_config and not typed.config_file:
        parser.error("--output_config needs --config_file with the path of the file to write")
    beneath: list[Config] = []  # the later one wins
    try:
        if typed.output_config:
            start_logging(parser, typed)
            write_config(config_path(typed.config_file), chosen(typed, parser))
            logger.info("wrote the options to %s", config_path(typed.config_file))
            parser.exit(0)
        actions = {action.dest: action for action in parser._actions if action.dest != "help"}
        if typed.config_file:
            beneath = [read_config(config_path(typed.config_file), actions, describe_other_options(parser))]
        asked = {name: value for one in beneath for name, value in one.values.items()} | given_values(typed, parser)
        if recipe := asked.get("recipe"):
            beneath = [
                read_recipe(recipe, script_name(parser), asked, actions, describe_other_options(parser)),
                *beneath,
            ]
    except ConfigFileError as error:
        start_logging(parser, typed)
        logger.error("%s", error)
        parser.exit(1)
    # argparse fills in defaults only where the namespace has nothing, so what was typed wins over the files.
    values = {name: value for one in beneath for name, value in one.values.items()}
    args = parse_words(parser, argv, argparse.Namespace(**values))
    start_logging(parser, args)
    for one in beneath:
        logger.info("options are read from %s", one.path)
        for warning in one.warnings:
            logger.warning("%s", warning)
    warn_of_repeats(parser, argv)
    return normalize(unset_empty(args, parser))


def warn_of_repeats(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Name what an option that is typed again loses: the last one counts alone, and lists do not add up."""
    for flag, given in typed_values(parser, sys.argv[1:] if argv is None else argv).items():
        lost = [word for words in given[:-1] for word in words if word not in given[-1]]
        if lost and flag.removeprefix("--") not in SECRETS:
            logger.warning(
                "%s is given %d times and the last one counts: %s has no effect%s", flag, len(given), " ".join(lost),
                f"; write all values behind one {flag}" if parser._option_string_actions[flag].nargs else "",
            )  # fmt: skip


def typed_values(parser: argparse.ArgumentParser, words: Sequence[str]) -> Mapping[str, list[list[str]]]:
    """Return what follows each option on a command line, once for every time that it is typed."""
    flags, found = parser._option_string_actions, dict[str, list[list[str]]]()
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            action = flags.get(flag) or next((flags[name] for name in flags if name.startswith(flag)), None)
            values = found.setdefault(action.option_strings[0] if action else flag, [])
            values.append([value] if equals else [])
        elif found:
            values[-1].append(word)
    return found


def from_program(parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
    """Read the options of a program that calls a trainer: what it leaves out, or sets to None, has its default, and
    values are read as generously as those of a config file.

    Raises ConfigFileError for a value that its option cannot take.
    """
    setup_logging(ConsoleOptions.from_args(argparse.Namespace(**{**ConsoleOptions.defaults(), **vars(given)})))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    plain = {name: as_in_toml(value) for name, value in vars(given).items() if value is not None}
    unchanged = {name for name, value in plain.items() if name in actions and value == actions[name].default}
    warnings: list[str] = []
    asked = {name: value for name, value in plain.items() if name not in unchanged}
    values = read_values(asked, "the calling program", actions, warnings, describe_other_options(parser))
    if name := values.get("recipe"):
        recipe = read_recipe(name, script_name(parser), values, actions, describe_other_options(parser))
        values, warnings = {**recipe.values, **values}, [*recipe.warnings, *warnings]
    for warning in warnings:
        logger.warning("%s", warning)
    defaults = {name: action.default for name, action in actions.items()}
    return normalize(unset_empty(argparse.Namespace(**{**defaults, **values}), parser))


def as_in_toml(value: Any) -> Any:
    """Return a value as a config file has it: paths are text, tuples are lists."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def start_logging(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Send messages where the options say; ends with status 1 where they cannot go there."""
    try:
        setup_logging(ConsoleOptions.from_args(args))
    except ValueError as error:
        setup_logging(ConsoleOptions())
        logger.error("%s", error)
        parser.exit(1)


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, beneath: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Parse `argv`, which wins over `beneath`. An unknown option ends with status 2, naming the nearest."""
    refuse_misread(parser, sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(argv, beneath)
    if unknown:
        hints = [word + hint(parser, word.split("=")[0]) if word.startswith("-") else word for word in unknown]
        parser.error(f"unrecognized arguments: {' '.join(hints)}")
    return args


def refuse_misread(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with the error for an unknown option where the whole name of another script's option is short for one of this
    script that cannot take its value: a file for a text encoder, read as its learning rate."""
    for word, following in pairwise((*words, "")):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in parser._option_string_actions:
            continue
        others = describe_other_options(parser)(flag.removeprefix("--"))
        for action, *_ in parser._get_option_tuples(flag) if others else ():
            try:
                parser._get_value(action, value if equals else following)
            except argparse.ArgumentError:
                parser.error(f"unrecognized arguments: {word}{others}")


def hint(parser: argparse.ArgumentParser, flag: str) -> str:
    """Name the scripts that have an unknown option, else the nearest option of this script."""
    return describe_other_options(parser)(flag.lstrip("-")) or nearest(flag, parser._option_string_actions)


def describe_other_options(parser: argparse.ArgumentParser) -> Callable[[str], str]:
    """Return what describes an option that only other scripts have; empty where a program brings its own parser."""
    return parser.elsewhere if isinstance(parser, TrainingParser) else lambda option: ""


def script_name(parser: argparse.ArgumentParser) -> str:
    return getattr(describe_other_options(parser), "name", parser.prog)


def unset_empty(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Replace empty strings and lists, which front ends pass for empty fields, by None where that is the default."""
    optional = {action.dest for action in parser._actions if action.default is None}
    return argparse.Namespace(**{k: None if v in ("", []) and k in optional else v for k, v in vars(args).items()})


def normalize(args: argparse.Namespace) -> argparse.Namespace:
    """Make plain what one option implies for another; normalizing twice changes nothing.

    Caching to disk implies caching, the old spelling of the caption extension wins, 0 is unset for counts that mean
    "never" or "not at all" then, and captions of 75 tokens are what an unset length means.
    """
    values: dict[str, Any] = dict(vars(args))
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if values.get(f"{name}_to_disk"):
            values[name] = True
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
    for name, facts in TrainOptions.facts().items():
        if facts.zero_is_unset and values.get(name) == 0:
            values[name] = None
    if values.get("max_token_length") == 75:
        values["max_token_length"] = None
    return argparse.Namespace(**values)


def chosen(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """Return the options that differ from their defaults, without passwords and without those about the file itself."""
    for name in SECRETS:
        if getattr(args, name, None):
            logger.warning("--%s is not written to the file; give it on the command line", name)
    left_out = {"config_file", "output_config", *SECRETS}
    return {name: value for name, value in given_values(args, parser).items() if name not in left_out}


def given_values(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
