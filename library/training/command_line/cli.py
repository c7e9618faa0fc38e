"""The command line: a flat parser, on top of a config file and a recipe."""

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from library.base.error_lines import print_error_line
from library.base.errors import NotThere, UserError, about, error_in
from library.options.base import Options
from library.options.leco import list_ignored_by_leco, list_refused_by_leco
from library.options.model import BASE_FLAG
from library.options.output.console import ConsoleOptions
from library.options.requirements import check_followers
from library.options.train import TrainOptions
from library.training.command_line.console import forgive_write_errors, start_run_log
from library.training.command_line.help import EXAMPLES, EXAMPLES_OF_PROMPTS, TrainingParser
from library.training.command_line.option_checks import check_options, check_values
from library.training.command_line.recipes import read_recipe
from library.training.config_file import (
    SECRETS,
    Config,
    config_path,
    is_foreign,
    nearest,
    read_config,
    read_values,
    write_config,
)
from library.training.reporting.error_fields import change_texts, describe_error, locate, wants_error_line

logger = logging.getLogger(__name__)


def build_parser(
    *groups: type[Options],
    parts: str = "",
    elsewhere: Callable[[str], str] = lambda option: "",
    examples: str = EXAMPLES,
    left_out: Collection[str] = (),
) -> argparse.ArgumentParser:
    """Build a parser with the options of all groups. It has no positional arguments and no required options, and
    accepts unambiguous prefixes.

    `parts` lists the options for a base model's other files, for the `examples` in the help; options in `left_out` are
    hidden. `elsewhere` describes an option that only other scripts have.
    """
    declarations = {name: declared for kind in groups for name, declared in kind.declarations().items()}
    usual = frozenset(name for name in declarations if declarations[name].usual)
    paths = frozenset(name for name in declarations if declarations[name].path)
    follows = {name: declared.follows for name, declared in declarations.items() if declared.follows}
    parser = TrainingParser(usual, parts, elsewhere, examples, frozenset(left_out), paths, follows)
    for kind in groups:
        kind.add_to(parser)
    return parser


def build_parser_of_prompts(kind: type[Options], elsewhere: Callable[[str], str]) -> argparse.ArgumentParser:
    """Build the parser of a script that trains on prompts alone; options without effect there are accepted and
    hidden."""
    left_out = {*list_ignored_by_leco(kind), *list_refused_by_leco(kind)}
    return build_parser(kind, elsewhere=elsewhere, examples=EXAMPLES_OF_PROMPTS, left_out=left_out)


def add_missing(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Declare the options of a class that a parser lacks."""
    for action in build_parser(kind)._actions:
        if not parser._option_string_actions.keys() & set(action.option_strings):
            parser._add_action(action)


@dataclass(frozen=True)
class CommandLine:
    """The options of a command line and of the files beneath it."""

    parser: argparse.ArgumentParser
    argv: Sequence[str] | None  # None: the process's arguments
    args: argparse.Namespace
    configs: Sequence[Config]

    def start_log(self) -> argparse.Namespace:
        """Start the log where the user wants it, and log where options come from. Return the options."""
        start_logging(self.parser, self.args)
        for config in self.configs:
            logger.info("options are read from %s", config.path)
            for warning in config.warnings:
                logger.warning("%s", warning)
        warn_of_repeats(self.parser, self.argv)
        return self.args

    def print_error(self, error: BaseException) -> None:
        """Log where the files that an error misses are to be had, and print it as JSON if --errors_json asks for it."""
        log_suggested_files(self.parser, error)
        values = vars(self.args)
        if not values.get("errors_json"):
            return
        paths = self.parser.paths if isinstance(self.parser, TrainingParser) else ()
        fields = describe_error(error, values, paths)
        fields = locate(replace(fields, file=fields.file or self.find_file(fields.setting)))
        print_error_line(change_texts(fields, lambda text: name_as_typed(text, self.args)))

    def find_file(self, setting: str | None) -> str | None:
        """Return the config file or recipe that an option stands in; None for one of the command line."""
        name = (setting or "").partition(" ")[0].removeprefix("--")
        if f"--{name}" in collect_typed_values(self.parser, sys.argv[1:] if self.argv is None else self.argv):
            return None
        return next((str(config.path) for config in reversed(self.configs) if name in config.values), None)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line and start the log, so that messages about the files go where the user wants them. Exits as
    `read_command_line`."""
    return read_command_line(parser, argv).start_log()


def read_command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> CommandLine:
    """Parse `argv` (default: the process's arguments), which overrides the config file, which overrides the recipe.

    Exits with status 2 for a bad option, 1 for a bad config file, and 0 after writing a config file; a parser that
    `raises_errors` raises UserError for the former two.
    """
    # Parsed alone first, because the command line may name a config file and a recipe, which go beneath it.
    typed = parse_words(parser, argv)
    if typed.output_config and not typed.config_file:
        need = about("--output_config", cause="needs")("needs --config_file with the path of the file to write")
        refuse(parser, need, argv)
    try:
        if typed.output_config:
            start_logging(parser, typed)
            write_config(config_path(typed.config_file), list_chosen(typed, parser))
            logger.info("wrote the options to %s", config_path(typed.config_file))
            parser.exit(0)
        configs = read_configs(parser, typed)
        args = combine(parser, argv, configs)
        own_configs = configs[1:] if getattr(args, "recipe", None) else configs
        check_followers(follows_of(parser), vars(args), list_own_names(parser, argv, own_configs))
    except UserError as error:
        if isinstance(parser, TrainingParser) and parser.raises_errors:
            raise
        start_logging(parser, typed)
        logger.error("%s", error)
        typed.errors_json = wants_error_line(sys.argv[1:] if argv is None else argv)
        CommandLine(parser, argv, typed, ()).print_error(error)
        parser.exit(1)
    return CommandLine(parser, argv, args, configs)


def read_configs(parser: argparse.ArgumentParser, typed: argparse.Namespace) -> list[Config]:
    """Read the recipe and the config file that a command line names; later ones override earlier ones. Raises
    UserError."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    elsewhere, configs = describe_other_options(parser), list[Config]()
    if typed.config_file and is_foreign(typed.config_file):
        from library.training.command_line.foreign_config import read_foreign  # few starts need it

        configs = [read_foreign(typed, script_name(parser), actions, elsewhere)]
    elif typed.config_file:
        configs = [read_config(config_path(typed.config_file), actions, elsewhere)]
    requested = {name: value for config in configs for name, value in config.values.items()}
    requested |= list_given_values(typed, parser)
    if recipe := requested.get("recipe"):
        configs = [read_recipe(recipe, script_name(parser), requested, actions, elsewhere), *configs]
    return configs


def follows_of(parser: argparse.ArgumentParser) -> Mapping[str, tuple[str, str]]:
    return parser.follows if isinstance(parser, TrainingParser) else {}


def list_own_names(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, configs: Sequence[Config]
) -> frozenset[str]:
    """Return the options that the command line and these config files set, also those set to their defaults."""
    typed = collect_typed_values(parser, sys.argv[1:] if argv is None else argv)
    return frozenset((*(flag.removeprefix("--") for flag in typed), *(name for c in configs for name in c.values)))


def combine(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, configs: Sequence[Config]
) -> argparse.Namespace:
    """Return the options of a command line and of the files beneath it."""
    # argparse only sets defaults that the namespace lacks, so the command line overrides the files.
    values = {name: value for config in configs for name, value in config.values.items()}
    return normalize(unset_empty(parse_words(parser, argv, argparse.Namespace(**values)), parser))


def check_words(
    parser: argparse.ArgumentParser, check: Callable[[argparse.Namespace], object], argv: Sequence[str] | None = None
) -> CommandLine:
    """Answer --help and refuse wrong options, also those of a config file, before a script imports torch, which takes
    seconds. `check` raises UserError for options that its script refuses."""
    forgive_write_errors()
    return exit_if_wrong(read_command_line(parser, argv), check)


def exit_if_wrong(command_line: CommandLine, check: Callable[[argparse.Namespace], object]) -> CommandLine:
    """Return the command line if `check` accepts it; else log why and exit with status 1."""
    try:
        check(command_line.args)
    except UserError as error:
        command_line.start_log()
        log_user_error(error, command_line)
        command_line.print_error(error)
        command_line.parser.exit(1)
    return command_line


def check_training(kind: type[TrainOptions], args: argparse.Namespace) -> None:
    """Raise UserError for options that a training script refuses."""
    options = kind.from_args(args)
    # Noise levels need neither a model nor images.
    (check_values if options.flat().get("show_timesteps") else check_options)(options)


def log_user_error(error: Exception, command_line: CommandLine | None) -> None:
    """Log an error that the user can fix."""
    logger.error("%s", error if command_line is None else name_as_typed(str(error), command_line.args))
    logger.debug("where it was found:", exc_info=error)


def name_as_typed(text: str, args: argparse.Namespace) -> str:
    """Return a text with the flag of the base model that was typed: --dit is musubi-tuner's name of it."""
    is_dit = getattr(args, "dit", None) and not getattr(args, "pretrained_model_name_or_path", None)
    return text.replace(BASE_FLAG, "--dit") if is_dit else text


def refuse(
    parser: argparse.ArgumentParser, error: UserError, argv: Sequence[str] | None, text: str | None = None
) -> NoReturn:
    """Exit with status 2 as argparse does; `text` replaces the error's in what people read."""
    if isinstance(parser, TrainingParser):
        parser.refuse(error, sys.argv[1:] if argv is None else argv, text)
    parser.error(text or str(error))


def warn_of_repeats(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Warn of options that are typed more than once: only the last one counts, and lists do not add up."""
    for flag, occurrences in collect_typed_values(parser, sys.argv[1:] if argv is None else argv).items():
        ignored = [word for words in occurrences[:-1] for word in words if word not in occurrences[-1]]
        if ignored and flag.removeprefix("--") not in SECRETS:
            logger.warning(
                "%s is given %d times and the last one counts: %s has no effect%s",
                flag,
                len(occurrences),
                " ".join(ignored),
                f"; write all values behind one {flag}" if parser._option_string_actions[flag].nargs else "",
            )


def collect_typed_values(parser: argparse.ArgumentParser, words: Sequence[str]) -> Mapping[str, list[list[str]]]:
    """Return the values of each option on a command line, one list per occurrence."""
    flags, values_by_flag = parser._option_string_actions, dict[str, list[list[str]]]()
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            # argparse accepts abbreviations, so the word may be the beginning of an option.
            action = flags.get(flag) or next((flags[name] for name in flags if name.startswith(flag)), None)
            values = values_by_flag.setdefault(action.option_strings[0] if action else flag, [])
            values.append([value] if equals else [])
        elif values_by_flag:
            values[-1].append(word)
    return values_by_flag


def from_program(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Read the options of a program that calls a trainer; missing ones and None get defaults, and values are converted
    as in a config file.

    Raises UserError for an invalid value.
    """
    start_run_log(ConsoleOptions.from_args(argparse.Namespace(**{**ConsoleOptions.defaults(), **vars(args)})))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    toml_values = {name: to_toml_value(value) for name, value in vars(args).items() if value is not None}
    # A program's namespace has a value for every option. Only those that differ from the default override the recipe.
    unchanged = {name for name, value in toml_values.items() if name in actions and value == actions[name].default}
    warnings: list[str] = []
    changed = {name: value for name, value in toml_values.items() if name not in unchanged}
    values = read_values(changed, "the calling program", actions, warnings, describe_other_options(parser))
    if name := values.get("recipe"):
        recipe = read_recipe(name, script_name(parser), values, actions, describe_other_options(parser))
        values, warnings = {**recipe.values, **values}, [*recipe.warnings, *warnings]
    for warning in warnings:
        logger.warning("%s", warning)
    defaults = {name: action.default for name, action in actions.items()}
    args = normalize(unset_empty(argparse.Namespace(**{**defaults, **values}), parser))
    check_followers(follows_of(parser), vars(args), changed)
    return args


def to_toml_value(value: Any) -> Any:
    """Convert a value to its form in a config file: paths become text, tuples become lists."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def start_logging(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Start logging as the options say; exit with status 1 if the log cannot be written."""
    try:
        start_run_log(ConsoleOptions.from_args(args))
    except UserError as error:
        # The requested log failed, so the error goes to a console with default options.
        start_run_log(ConsoleOptions())
        logger.error("%s", error)
        CommandLine(parser, None, args, ()).print_error(error)
        parser.exit(1)


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Parse `argv`, which overrides the values of `namespace`.

    For an unknown option, exit with status 2 and name the nearest one.
    """
    refuse_misread(parser, sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(argv, namespace)
    if unknown:
        hints = [word + hint(parser, word.split("=")[0]) if word.startswith("-") else word for word in unknown]
        # Their values are left out, because a mistyped flag may be that of a password.
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown
        named = " ".join(flag + hint(parser, flag) if flag.startswith("-") else flag for flag in flags)
        error = error_in(flags[0], others=flags[1:])(f"unrecognized arguments: {named}")
        refuse(parser, error, argv, f"unrecognized arguments: {' '.join(hints)}")
    return args


def refuse_misread(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Reject an unknown option that argparse would accept as an abbreviation but that is another script's option: a
    text encoder's file, for example, would be read as its learning rate."""
    for word, following in pairwise((*words, "")):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in parser._option_string_actions:
            continue
        other_scripts = describe_other_options(parser)(flag.removeprefix("--"))
        for action, *_ in parser._get_option_tuples(flag) if other_scripts else ():
            try:
                # Only a value that the abbreviated option cannot take shows that another script's option was meant.
                parser._get_value(action, value if equals else following)
            except argparse.ArgumentError:
                text = f"unrecognized arguments: {word}{other_scripts}"
                refuse(parser, error_in(flag)(f"unrecognized arguments: {flag}{other_scripts}"), words, text)


def hint(parser: argparse.ArgumentParser, flag: str) -> str:
    """Name the scripts that have an unknown option, else the nearest option of this script."""
    return describe_other_options(parser)(flag.lstrip("-")) or nearest(flag, parser._option_string_actions)


def describe_other_options(parser: argparse.ArgumentParser) -> Callable[[str], str]:
    """Return the function that describes other scripts' options; it returns "" if a program brings its own parser."""
    return parser.elsewhere if isinstance(parser, TrainingParser) else lambda option: ""


def script_name(parser: argparse.ArgumentParser) -> str:
    return getattr(describe_other_options(parser), "name", parser.prog)


def log_suggested_files(parser: argparse.ArgumentParser, error: BaseException) -> None:
    """Log where the files of a model that an error misses are to be had."""
    find = getattr(describe_other_options(parser), "suggest_files", None)
    missing = next((e for e in (error, error.__cause__) if isinstance(e, NotThere)), None)
    if missing is not None and find is not None and (files := find((missing.setting, *missing.others))):
        logger.error("%s", files)


def unset_empty(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Replace empty strings and lists, which front ends pass for empty fields, with None if that is the default."""
    optional = {action.dest for action in parser._actions if action.default is None}
    return argparse.Namespace(**{k: None if v in ("", []) and k in optional else v for k, v in vars(args).items()})


def normalize(args: argparse.Namespace) -> argparse.Namespace:
    """Apply what one option implies for another; idempotent.

    Caching to disk implies caching, the old spelling of the caption extension takes precedence, 0 means unset for
    counts, and a caption length of 75 tokens is the default.
    """
    values: dict[str, Any] = dict(vars(args))
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if values.get(f"{name}_to_disk"):
            values[name] = True
    if values.get("caption_extention"):
        values["caption_extension"] = values["caption_extention"]
    for name, declared in TrainOptions.declarations().items():
        if declared.zero_is_unset and values.get(name) == 0:
            values[name] = None
    if values.get("max_token_length") == 75:
        values["max_token_length"] = None
    return argparse.Namespace(**values)


def list_chosen(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """Return the options that differ from their defaults, without passwords and config file options."""
    for name in SECRETS:
        if getattr(args, name, None):
            logger.warning("--%s is not written to the file; give it on the command line", name)
    left_out = {"config_file", "output_config", *SECRETS}
    return {name: value for name, value in list_given_values(args, parser).items() if name not in left_out}


def list_given_values(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
