"""The steps of train.py, from the command line to the trained adapter."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from library.base.errors import about
from library.base.terminal import ask as ask_user
from library.train_photos.base import Base, choose_recipe
from library.train_photos.captioner import write_captions
from library.train_photos.description import describe_plan, remark_on_trigger
from library.train_photos.like import like_recipe
from library.train_photos.photos import (
    PhotoFolder,
    Trigger,
    clean,
    find_photos,
    parse_trigger,
    select_photos,
    suggest_trigger,
)
from library.train_photos.plan import Files, Plan, RunOrder, choose_side, make_plan, read_options
from library.train_photos.record import Record
from library.train_photos.runs import EarlierRun, Start, check_name, choose_start, find_runs, list_names, make_record
from library.train_photos.training import train, write, write_command
from library.training.command_line.recipes import Recipe
from library.training.reporting.console_lines import announce


def train_photos(args: argparse.Namespace, base: Base, given: Mapping[str, Any]) -> int:
    """Plan, ask and train. `given` are options of the base model's script.

    Raises UserError for what the user has to decide.
    """
    check_length(args)
    asks = not args.yes and sys.stdin.isatty() and sys.stdout.isatty()
    recipe = find_recipe(args, base)
    side = choose_side(base, recipe.values, given, ())
    folders = find_photos(args.photos, side)
    if args.caption and write_captions(folders):
        folders = find_photos(args.photos, side)
    side = choose_side(base, recipe.values, given, folders)
    folders = select_photos(args.photos, folders, side, args.leave_out, args.keep_all)
    names = partial(list_names, args.output_dir, args.name or clean(args.photos.absolute().name))
    if args.name is not None:
        check_name(next(names()))
    runs, free = find_runs(names())
    trigger = choose_trigger(args.trigger, args.photos, folders, runs, asks)
    check_class_images(args.class_images, trigger)
    order = RunOrder(args, base, recipe, folders, trigger, side, given)
    record, make = make_record(order), partial(plan_run, order)
    choose_length = cache(partial(choose_steps, args, make))
    start = choose_start(runs, free, record, choose_length, partial(ask, asks))
    if start.earlier is not None and start.earlier.record.length != record.length:
        start = replace(start, steps=choose_length())
    return confirm(make(start), start, replace(record, origin=start.origin), args.plan_only, asks)


def find_recipe(args: argparse.Namespace, base: Base) -> Recipe:
    """Return the recipe for the base, with what the file of --like says. Raises UserError for a file that says
    nothing."""
    recipe = choose_recipe(base, args.kind)
    return recipe if args.like is None else like_recipe(args.like, base, recipe)


def check_length(args: argparse.Namespace) -> None:
    """Raise UserError for a length that is none."""
    for flag, value in (("--steps", args.steps), ("--minutes", args.minutes)):
        if value is not None and not 0 < value < 10**7:
            raise about(flag)(f"is {value:g}", "use a number above 0")


def check_class_images(number: int, trigger: Trigger) -> None:
    """Raise UserError for images of a class that cannot be drawn."""
    if number < 0:
        raise about("--class_images")(f"is {number}", "use the number of images, such as 100")
    if number and not trigger.subject:
        raise about("--class_images", cause="needs")(
            "needs what the photos show", 'give it behind the trigger: --trigger "mycat, a cat"'
        )


def choose_trigger(
    text: str | None, root: Path, folders: Sequence[PhotoFolder], runs: Sequence[EarlierRun], asks: bool
) -> Trigger:
    """Return the trigger of the command line, else of the terminal; usual is that of an unfinished run, else the
    folder's name."""
    usual = suggest_trigger(root, folders)
    unfinished = next((run.record.trigger for run in reversed(runs) if not run.is_finished), usual.text)
    if unfinished != usual.text:
        usual = parse_trigger(unfinished)
    if text is None and asks:
        text = ask_user(f'Trigger word, and what it is, such as "mycat, a cat" [{usual.text}]: ').strip()
        text = None if text == usual.text else text
    trigger = parse_trigger(text) if text else usual
    for remark in remark_on_trigger(trigger):
        announce(f"note      {remark}")
    return trigger


def plan_run(order: RunOrder, start: Start | None) -> Plan:
    """Return the plan of a run, or that of NAME.toml for one that goes on."""
    if start is not None and start.earlier is not None:
        values = read_options(order.base, start.files).flat()
        return Plan(order, values | ({} if start.steps is None else {"max_train_steps": start.steps}))
    with TemporaryDirectory() as folder:
        return make_plan(order, Files(Path(folder), "plan"))


def choose_steps(args: argparse.Namespace, make: "partial[Plan]") -> int | None:
    """Return the length that the command line asks for; None if it asks for none."""
    if args.minutes is not None:
        return int(make(None).values["max_train_steps"])
    return None if args.steps is None else int(args.steps)


def ask(asks: bool, sentence: str, question: str) -> str:
    """Say a sentence, and return the answer to the question; "" without a terminal or a question."""
    announce(sentence)
    return ask_user(f"{question} ").strip().lower() if asks and question else ""


def confirm(plan: Plan, start: Start, record: Record, only: bool, asks: bool) -> int:
    """Show the plan, ask whether to train, and train; with `only` write it. Return the exit status."""
    announce("\n".join(describe_plan(plan, start.files)))
    answer = "e" if only else "y"
    if asks and not only and start.earlier is None:  # else it was asked whether to go on
        answer = ask_user("Train? [Y/n, e: write the plan to edit it] ").strip().lower() or "y"
    if answer == "e":
        if start.earlier is None:
            write(plan.texts, start.files, record)
        command = write_command(plan, start)
        announce(f"The plan is {start.files.config}. To train, give the same command again, or\n  {command}")
        return 0
    return train(plan, start, record) if answer in ("y", "yes") else 0
