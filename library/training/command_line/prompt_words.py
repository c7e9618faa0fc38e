"""Checks of the command line of training on prompts, before torch is imported: it recognises the base model, and with
it the other options."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from library.base.errors import UserError
from library.options.config_file import read_toml
from library.options.leco import LecoOptions
from library.training.command_line.cli import (
    CommandLine,
    build_parser_of_prompts,
    check_training,
    check_words,
    exit_if_wrong,
    normalize,
    read_configs,
    unset_empty,
)
from library.training.config_file import CONFIG_FLAG, config_path, flatten

BASE, PROMPTS, CONFIG = "pretrained_model_name_or_path", "prompts_file", "config_file"
HELP = ("-h", "--help", "--help_all")


def read_requested(words: Sequence[str]) -> tuple[str, str]:
    """Return the base model and the prompts file of a command line or its config file; "" for a missing one."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in (BASE, PROMPTS, CONFIG):
        parser.add_argument(f"--{name}", nargs="?")  # a missing value is reported by the full parser
    typed = vars(parser.parse_known_args(words)[0])
    from_file = {}
    if typed[CONFIG] and config_path(typed[CONFIG]).is_file():
        from_file = flatten(read_toml(config_path(typed[CONFIG]), CONFIG_FLAG), config_path(typed[CONFIG]), [])
    base, prompts = (str(typed[name] or from_file.get(name) or "") for name in (BASE, PROMPTS))
    return base, prompts


def check_common_words(elsewhere: Callable[[str], str], others: Sequence[argparse.ArgumentParser]) -> None:
    """Answer --help and refuse wrong options that do not depend on the base model; `others` are the parsers of all base
    models. Exits as `check_words`."""
    words = sys.argv[1:]
    parser = build_parser_of_prompts(LecoOptions, elsewhere)
    known = {name for other in others for name in other._option_string_actions}
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    is_unknown = any(not any(name.startswith(flag) for name in known) for flag in flags if flag not in HELP)
    if is_unknown or not read_requested(words)[0]:
        check_words(parser, partial(check_training, LecoOptions), words)
        return
    if set(words) & set(HELP):  # of the base model's options
        return
    parser.allow_abbrev = False  # an abbreviation may be that of an option which only the base model has
    try:
        configs = read_configs(parser, parser.parse_known_args(words)[0])
    except UserError:  # it may be right for the base model
        return
    values = {name: value for config in configs for name, value in config.values.items()}
    args = normalize(unset_empty(parser.parse_known_args(words, argparse.Namespace(**values))[0], parser))
    for name, action in parser._option_string_actions.items():
        if any(other._option_string_actions[name].choices != action.choices for other in others):
            setattr(args, action.dest, action.default)  # a base model takes other values
    exit_if_wrong(CommandLine(parser, words, args, configs), partial(check_training, LecoOptions))
