"""Trains every combination of a sweep as a run of its own, one process after the other.

Imports no torch: what needs it, checking the runs before the first one and comparing their losses, is done in a process
of its own (`worker`), so that the driver takes no memory that a run needs.
"""

import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import about, error_in
from library.base.formatting import format_bytes
from library.base.launcher import launched_count
from library.base.temporary_folders import delete_abandoned_folders, make_temporary_folder
from library.options.train import TrainOptions
from library.training.saving.run_lock import run_lock, unwritable
from library.training.sweep.children import Children
from library.training.sweep.combinations import (
    Combination,
    describe_sweep,
    digest_encoded,
    expand_combinations,
    find_unranked,
    parse_word,
)
from library.training.sweep.commands import Command, Script, write_command
from library.training.sweep.listing import print_list
from library.training.sweep.outcomes import STOPPED, Outcome, end_file, read_outcome, report_file
from library.training.sweep.rounds import Rounds, delete_passed, end_at_pause, list_pauses
from library.training.sweep.worker import Imported, RunSize, Standing, call_worker

logger = logging.getLogger(__name__)

CACHES = ("cache_latents", "cache_text_encoder_outputs")
PAGE_ENDING = "-sweep.html"
DROPPED = "another one was significantly better (--sweep_stop_after)"
RANK = Imported("library.training.sweep.ranking", "rank_and_write")

Check = Callable[[Sequence[TrainOptions]], Sequence[RunSize]]
"""(options of each run) -> what each writes. Raises UserError for what a run would refuse."""


@dataclass
class Member:
    """A run of a sweep, and what is known of it."""

    number: int
    combination: Combination[Any]
    outcome: Outcome = field(default_factory=Outcome)
    status: int | None = None  # of its process; None before
    ended: str = ""  # why it ended before its last step

    @property
    def label(self) -> str:
        return self.combination.label

    @property
    def options(self) -> TrainOptions:
        options: TrainOptions = self.combination.options
        return options

    @property
    def has_failed(self) -> bool:
        return bool(self.status) and self.outcome.cause != "non-finite"

    @property
    def standing(self) -> Standing:
        file, outcome = end_file(self.options.saving), self.outcome
        name = file.name if file.exists() else None
        return Standing(self.label, outcome.step, outcome.measured_step, outcome.losses, self.ended, name)


def run_sweep(script: Script[Any], options: TrainOptions, check: Check, has_signals: bool = True) -> int:
    """Train every combination, or list them. Return the exit status: 0 if all are finished, or the sweep was stopped
    and is saved.

    `check` is called in a process of its own. Raises UserError for an invalid sweep.
    """
    if (count := launched_count()) > 1:
        raise error_in("--sweep")(
            f"--sweep starts each run as a process of its own, and {count} processes were launched",
            "start it without "
            f'a launcher, and give it --launcher "accelerate launch --num_processes {count}", which stands before '
            "each of its runs",
        )
    words = options.sweep
    if words.sweep_only is not None and options.run.seed is None:
        raise error_in("--sweep_only")(
            "--sweep_only needs --seed, which it shares with the runs that other machines train"
        )
    seed = find_seed(options) if options.run.seed is None else options.run.seed
    members = resolve_members(options, seed)
    if words.sweep_only is not None and words.sweep_only > len(members):
        raise error_in("--sweep_only")(
            f"--sweep_only is {words.sweep_only}, and --sweep has {len(members)} runs", "see --sweep_list"
        )
    if words.sweep_list:
        folder = Path(options.saving.output_dir or tempfile.gettempdir())
        commands = [write_command(script, member.options, words.launcher, folder) for member in members]
        print_list(words.sweep_list, [member.combination for member in members], commands)
        return 0
    if options.run.seed is None:
        logger.info("no --seed given: using --seed %d", seed)
    swept = dict(parse_word(item, options) for item in words.sweep or ())
    for line in describe_sweep(options.network, swept, [member.combination for member in members]):
        logger.info("%s", line)
    chosen = members if words.sweep_only is None else [members[words.sweep_only - 1]]
    return Sweep(script, options, seed, members, has_signals=has_signals).train(chosen, check)


def resolve_members(options: TrainOptions, seed: int) -> list[Member]:
    """Return the runs of a sweep, with the seeds that all of them share."""
    validation = options.validation
    if validation.validation_seed is None and options.concepts is None:
        validation = replace(validation, validation_seed=seed)
    seeded = replace(options, run=replace(options.run, seed=seed), validation=validation)
    combinations = expand_combinations(seeded)
    return [Member(number, combination) for number, combination in enumerate(combinations, 1)]


def find_seed(options: TrainOptions) -> int:
    """Return the seed that an earlier start of this sweep has drawn, else a new one."""
    with suppress(OSError, ValueError):
        return int(seed_file(options).read_text())
    return secrets.randbelow(2**32)


def seed_file(options: TrainOptions) -> Path:
    """Return the hidden file that keeps a drawn seed, so that the same command continues the same runs."""
    return Path(options.saving.output_dir or "") / f".{options.saving.output_name or 'last'}.sweep-seed"


@dataclass
class Sweep:
    """The runs of a sweep that are being trained."""

    script: Script[Any]
    options: TrainOptions
    seed: int
    members: Sequence[Member]
    children: Children = field(default_factory=Children)
    folder: Path = Path()  # temporary: shared caches, and what no command line can hold
    has_signals: bool = True  # False in a program, which handles them itself

    @property
    def only_tries(self) -> bool:
        """True if no run is trained to its end."""
        return self.options.diagnostics.dry_run or self.options.dataset.only_looks

    def train(self, chosen: Sequence[Member], check: Check) -> int:
        """Train some of the runs. Return the exit status."""
        is_alone = self.options.sweep.sweep_only is not None
        if self.only_tries:
            chosen = first_and_largest(chosen)
        rounds = Rounds.build(self.options, find_unranked(self.options))
        with ExitStack() as stack:
            if not (self.only_tries or is_alone):
                stack.enter_context(run_lock(self.options.saving))
            self.folder = open_folder(self.options, None if self.only_tries else self.seed)
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if self.has_signals:
                stack.enter_context(self.children.receiving_signals())
            sizes = call_worker(check, [member.options for member in chosen])
            if self.options.saving.output_dir and not self.only_tries:
                check_room(chosen, sizes, rounds)
            status = self.stopped_status() if self.children.is_stopped else self.train_all(chosen, rounds)
            if status is not None or self.only_tries:
                return status or 0
            if not is_alone:
                self.rank()
        # Damaged numbers end one run; only where all have them, the sweep has failed.
        has_result = any(not member.status for member in chosen)
        return int(any(member.has_failed for member in chosen) or not has_result)

    def train_all(self, chosen: Sequence[Member], rounds: Rounds | None) -> int | None:
        """Train the runs, in rounds if requested. Return the status of a sweep that cannot go on, else None."""
        active = list(chosen)
        while active:
            pause = None if rounds is None or len(active) == 1 else rounds.next_step()
            for member in active:
                status = self.train_one(member, pause)
                if status is not None:
                    return status
            if rounds is None or pause is None:
                return None
            active = self.end_worse([member for member in active if member.outcome.reason == STOPPED], rounds)
        return None

    def train_one(self, member: Member, pause: int | None) -> int | None:
        """Train a run, to a pause or to its end. Return the status of a sweep that cannot go on, else None."""
        options = self.complete(member, pause)
        reached = max(list_pauses(options.saving), default=0)
        if pause is not None and reached >= pause:  # of a sweep that was stopped
            outcome = read_outcome(options.saving, options.reports.log_events)
            member.status, member.outcome = 0, replace(outcome, reason=STOPPED, step=reached)
            return None
        command = self.write_command(options)
        own = self.write_command(member.options)  # without what belongs to the sweep
        logger.info("--sweep: run %d of %d, %s: %s", member.number, len(self.members), member.label, own.shown)
        started = time.time()
        member.status = self.children.run(command.words)
        member.outcome = read_outcome(options.saving, options.reports.log_events, started)
        member.ended = member.outcome.ended
        if self.children.is_stopped:
            return self.stopped_status(member.status)
        if self.options.sweep.sweep_stop_after and not member.status:
            delete_passed(options.saving, options.state.save_state, member.outcome.step)
        return self.judge(member, pause)

    def judge(self, member: Member, pause: int | None) -> int | None:
        """Log how a run ended. Return the status of a sweep that cannot go on, else None."""
        if member.outcome.cause == "non-finite":
            logger.error("--sweep: %s ended, because its losses were not finite. The other runs go on", member.label)
        elif member.status and not any(other.outcome.step for other in self.members):
            return member.status  # before the first step of the first run, as the others would
        elif member.status:
            logger.error("--sweep: %s ended with status %d. The other runs go on", member.label, member.status)
        elif pause is None and member.outcome.reason == STOPPED:
            logger.warning("--sweep: %s was stopped, so the sweep ends; the same command continues it", member.label)
            return 0
        return None

    def write_command(self, options: TrainOptions) -> Command:
        return write_command(self.script, options, self.options.sweep.launcher, self.folder)

    def complete(self, member: Member, pause: int | None) -> TrainOptions:
        """Return a run's options to a pause, with what it shares with others."""
        shared = {} if self.only_tries else self.share(member)
        return member.options.with_values({**shared, "pause_after_step": pause})

    def share(self, member: Member) -> dict[str, Any]:
        """Return a run's caches that others use too, and its events where its losses would leave no trace."""
        values: dict[str, Any] = {}
        if member not in first_and_largest(self.members):
            values["selftest"] = False
        given = member.options.flat()
        in_memory = [name for name in CACHES if given.get(name) and not given.get(f"{name}_to_disk")]
        # Beside caches that are kept in files anyway, which have places of their own, others stay in memory.
        if in_memory and not any(given.get(f"{name}_to_disk") for name in CACHES):
            values |= {f"{name}_to_disk": True for name in in_memory}
            # Posteriors are sampled with the seed of a run.
            values["shared_cache_dir"] = str(self.folder / f"caches-{digest_encoded(member.options)}")
        if given["no_report"] and not given["log_events"]:
            values["log_events"] = str(self.folder / f"{member.label}.jsonl")
        return values

    def end_worse(self, active: Sequence[Member], rounds: Rounds) -> list[Member]:
        """End the runs that are significantly worse than the best one, with the weights of their pause as adapter.
        Return the others."""
        if len(active) < 2:
            return list(active)
        worse = call_worker(rounds.find_worse, [member.standing for member in active], len(self.members))
        for member in (member for member in active if member.label in worse):
            member.ended = DROPPED
            logger.info("--sweep: %s ends after step %d: %s", member.label, member.outcome.step, DROPPED)
            end_at_pause(member.options.saving, member.options.state.save_state, member.outcome.step)
        return [member for member in active if member.label not in worse]

    def rank(self) -> None:
        """Log the ranking, and write its page."""
        name = self.options.saving.output_name or "last"
        page = Path(self.options.saving.output_dir or "") / f"{name}{PAGE_ENDING}"
        lines = call_worker(
            RANK,
            [member.standing for member in self.members],
            name,
            None if self.options.reports.no_report else page,
            find_unranked(self.options),
            {member.label: dict(member.combination.chosen) for member in self.members},
            {member.label: report_file(member.options.saving) for member in self.members},
        )
        for line in lines:
            logger.info("%s", line)

    def stopped_status(self, status: int = 0) -> int:
        """Return the status of a sweep that a signal stopped, with that of the run."""
        logger.warning("--sweep: stopped; the same command continues it")
        number = self.children.signal or 0
        return 128 + number if status or self.options.diagnostics.exit_status_on_stop else 0


def open_folder(options: TrainOptions, seed: int | None) -> Path:
    """Create the temporary folder of a sweep, delete those of killed ones, and keep a drawn seed, if there is one."""
    is_kept = options.saving.output_dir and seed is not None
    parent = Path(str(options.saving.output_dir) if is_kept else tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        delete_abandoned_folders([parent])
        if seed is not None and options.run.seed is None and not seed_file(options).exists():
            write_whole(seed_file(options), str(seed))
        return Path(make_temporary_folder("sweep", str(parent)))
    except OSError as error:
        raise unwritable("--output_dir", parent, error) from error


def check_room(chosen: Sequence[Member], sizes: Sequence[RunSize], rounds: Rounds | None) -> None:
    """Raise UserError unless the disk has room for the files of all runs, and for the states that rounds keep."""
    left = [(m, size) for m, size in zip(chosen, sizes, strict=True) if not end_file(m.options.saving).exists()]
    if not left:
        return
    folder = end_file(left[0][0].options.saving).parent
    free, files = shutil.disk_usage(folder).free, sum(size.adapter for _, size in left)
    states = 0 if rounds is None else sum(size.state for _, size in left)
    if free >= files + states:
        return
    reason = f"has {format_bytes(free)} free, and the files of {len(left)} runs take {format_bytes(files)}"
    if states:
        reason += f", and their states, which --sweep_stop_after keeps between rounds, {format_bytes(states)}"
    raise about("--output_dir", folder)(reason, "make room, or name another folder")


def first_and_largest(members: Sequence[Member]) -> list[Member]:
    """Return the first run, and the one of the highest rank, which needs the most memory."""
    largest = max(members, key=lambda member: member.options.network.network_dim or 0)
    return [members[0]] if largest is members[0] else [members[0], largest]
