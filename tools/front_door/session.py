"""The steps of train.py, from the command line to the trained adapter."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from library.errors import UserError
from library.terminal import ask
from library.training.reporting.console_lines import announce
from tools.front_door.base import choose_recipe, recognise
from tools.front_door.captioner import write_captions
from tools.front_door.photos import PhotoFolder, Trigger, clean, find_photos, parse_trigger, suggest_trigger
from tools.front_door.plan import Files, Wishes, describe_plan, make_plan
from tools.front_door.training import choose_files, train


def train_photos(args: argparse.Namespace) -> int:
    """Plan, ask and train. Raises UserError for what the user has to decide."""
    check_length(args)
    asks = not args.yes and sys.stdin.isatty() and sys.stdout.isatty()
    base, folders = recognise(args.base), find_photos(args.photos)
    if args.caption and write_captions(folders):
        folders = find_photos(args.photos)
    recipe = choose_recipe(base, args.kind)
    trigger = choose_trigger(args.trigger, args.photos, folders, asks)
    files = choose_files(args.output_dir, args.name, clean(args.photos.absolute().name))
    with TemporaryDirectory() as folder:
        wishes = Wishes(trigger, args.steps, args.minutes, args.models, args.prediction)
        plan = make_plan(base, recipe, folders, wishes, Files(Path(folder), files.name))
    announce("\n".join(describe_plan(plan, files)))
    if asks and ask("Train? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        return 0
    return train(plan, files)


def check_length(args: argparse.Namespace) -> None:
    """Raise UserError for a length that is none."""
    for flag, value in (("--steps", args.steps), ("--minutes", args.minutes)):
        if value is not None and not 0 < value < 10**7:
            raise UserError.about(flag, f"is {value:g}; use a number above 0")


def choose_trigger(text: str | None, root: Path, folders: Sequence[PhotoFolder], asks: bool) -> Trigger:
    """Return the trigger of the command line, else of the terminal, else of the folder's name."""
    usual = suggest_trigger(root, folders)
    if text is None and asks:
        text = ask(f'Trigger word, and what it is, such as "mycat, a cat" [{usual.text}]: ').strip()
    return parse_trigger(text) if text else usual
