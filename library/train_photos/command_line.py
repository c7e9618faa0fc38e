"""The command line of train.py: its own options, and any option of the base model's script."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from library.base.errors import about
from library.train_photos.base import FLAG, Base, recognise
from library.training.command_line.cli import parse_words, to_toml_value
from library.training.config_file import SECRETS

BY_SCRIPT = "use the base model's own script, whose command --plan_only prints"
PHOTOS = "it trains on the folder PHOTOS"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("dataset_config", "train_data_dir", "in_json", "dataset_class"), PHOTOS),
    **dict.fromkeys(("config_file", "recipe"), "it writes this file itself; give its options here"),
    **dict.fromkeys(("pretrained_model_name_or_path", "dit"), f"give {FLAG}"),
    **dict.fromkeys(("max_train_steps", "max_train_epochs"), "give --steps or --minutes"),
    **dict.fromkeys(("resume", "autoresume", "initial_step", "initial_epoch"), "the same command again goes on"),
    **dict.fromkeys(("dry_run", "debug_dataset", "audit_only", "show_timesteps", "output_config"), BY_SCRIPT),
    **dict.fromkeys(SECRETS, "it would be written to a file; log in to the service instead"),
    "output_name": "give --name",
    "sample_prompts": "it writes prompts with the trigger; edit them after --plan_only",
}
"""Options of the scripts that train.py does not take, each with what to do."""


def read_command_line(
    add_options: Callable[[argparse.ArgumentParser], None],
    own: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    raises: bool = False,
) -> tuple[argparse.Namespace, Base, dict[str, Any]]:
    """Return the options of train.py, the base, and the options of its script that were typed, in the form of a config
    file.

    `own` is the parser of train.py alone, with what `add_options` adds. The script's parser reads all words, because
    only it knows how many of them belong to its options. Raises UserError for options that train.py does not take; for
    words that cannot be read it exits with status 2 unless it `raises`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    only_base = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_base.add_argument(FLAG)
    name = only_base.parse_known_args(words)[0].base
    if name is None or {"-h", "--help", "--version"} & {*words}:
        own.parse_args(words)
        own.error(f"{FLAG} is missing")
    base = recognise(name)
    parser = base.make_parser()
    parser.prog, parser.allow_abbrev, parser.raises_errors = own.prog, False, raises
    for container in (parser, *parser._action_groups):
        container.conflict_handler = "resolve"  # train.py's own --output_dir replaces the script's
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    add_options(parser)
    typed, names = vars(parse_words(parser, words)), {action.dest for action in own._actions}
    given = {option: to_toml_value(value) for option, value in typed.items() if option not in names}
    for option in given.keys() & REFUSED.keys():
        raise about(f"--{option}")(f"is no option of train.py: {REFUSED[option]}")
    return argparse.Namespace(**{name: value for name, value in typed.items() if name in names}), base, given
