"""`add`: a command line becomes a job."""

import argparse
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from library.base.errors import about, of_file
from library.base.suggestions import did_you_mean
from library.options.config_file import read_text, read_toml
from library.options.train import TrainOptions
from library.training.command_line.cli import check_training, parse_words, read_command_line
from library.training.command_line.recipes import list_recipes
from library.training.config_file import CONFIG_FLAG, config_path
from library.training.run_queue.jobs import Job

logger = logging.getLogger(__name__)

SCRIPT_NAME = re.compile(r"\b\w+\.py\b")
ReadScript = Callable[[str, Sequence[str]], tuple[argparse.ArgumentParser, type[TrainOptions]]]
"""Return the parser and the options of a script, given its name and the words of a command line."""


def make_job(
    config: Path, script: str | None, words: Sequence[str], scripts: Collection[str], read_script: ReadScript
) -> Job:
    """Check a training as its script does before it imports torch, and return it as a job.

    `words` are the options after the TOML file. Raises UserError for an unknown script and for options that the script
    refuses, such as a base model that does not exist; exits with status 2 for words that are no options.
    """
    path = Path(os.path.abspath(config_path(str(config))))
    text = read_text(path, "NAME.toml")
    name = choose_script(path, text, script, scripts)
    refuse_file_options(words)
    parser, kind = read_script(name, words)
    typed = parse_words(parser, words)
    if typed.config_file or typed.output_config:
        flags = ["--config_file", "--output_config"]
        reason = f"and {flags[1]}: the job has its TOML file already; leave them out"
        raise about(flags[0], others=flags[1:])(reason)
    command_line = read_command_line(parser, ["--config_file", str(path), *words])
    for warning in (warning for read in command_line.configs for warning in read.warnings):
        logger.warning("%s", warning)
    args = command_line.args
    check_training(kind, args)
    if not args.output_dir:
        reason = "is not set; a job trains an adapter, so give the folder that it goes to"
        raise about("--output_dir", cause="needs")(reason)
    output = Path(os.path.realpath(args.output_dir)) / (args.output_name or "last")
    warn_of_states(output, args.output_name)
    events = args.log_events if args.log_events in (None, "-") else os.path.abspath(args.log_events)
    since = time.time() if args.resume else None
    return Job(name, str(path), text, tuple(words), os.getcwd(), str(output), events, since)


def choose_script(path: Path, text: str, script: str | None, scripts: Collection[str]) -> str:
    """Return the script of a TOML file: the given one, that of its recipe, or the one that its first comments name.

    Raises UserError if it is unknown.
    """
    if script is not None:
        name = Path(script).name
        if name not in scripts:
            raise about("--script")(f"{script} is no training script of this suite{did_you_mean(name, scripts)}")
        return name
    recipe = read_toml(path, CONFIG_FLAG).get("recipe")
    of_recipe = {known.script for known in list_recipes() if known.name == recipe} if isinstance(recipe, str) else set()
    comments = re.match(r"(?:#.*\n|\s*\n)*", text)
    named = {*SCRIPT_NAME.findall(comments[0] if comments else "")} & {*scripts}
    found = of_recipe or named
    if len(found) != 1:
        raise of_file(path)("names no training script", "add --script, such as --script train_network.py")
    return found.pop()


def refuse_file_options(words: Sequence[str]) -> None:
    """Raise UserError for options that end a command before it trains."""
    if ended := {"-h", "--help", "--help_all", "--version"} & {*words}:
        raise about(sorted(ended)[0])("after NAME.toml trains nothing", "leave it out")


def warn_of_states(output: Path, output_name: str | None) -> None:
    """Warn of states from which the job will continue."""
    if output_name and (states := glob.glob(f"{glob.escape(str(output))}*-state")):
        logger.warning(
            "%s is there: the job continues an earlier run of this name, and is done at once if that was complete. To "
            "train anew, use another --output_name",
            sorted(states)[0],
        )
