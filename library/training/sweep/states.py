"""The states that a sweep resumes from: one per adapter, all of the same step."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from library.checkpoints.tree_json import load_tree
from library.errors import UserError
from library.options.output.saving import HubOptions, StateOptions
from library.processes import Processes
from library.training.saving.names import Names
from library.training.saving.resume import clear_up, find_state
from library.training.saving.state import (
    StateManifest,
    are_undamaged,
    is_state_name,
    iterate_states,
    read_manifest,
    require_undamaged,
)
from library.training.sweep_record import PART, Ended, SweepRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundStates:
    """The states that a run resumes from."""

    by_label: Mapping[str, StateManifest]
    record: SweepRecord | None = None  # of the sweep to resume

    @property
    def of_run(self) -> StateManifest | None:
        """Return a state with the seed that all adapters share; None if the run starts from the beginning."""
        first = next(iter(self.by_label.values()), None)
        return first if first is None or self.record is None else replace(first, seed=self.record.seed)


def find_states(
    options: StateOptions, hub: HubOptions, names: Mapping[str, Names | None], processes: Processes, clears: bool
) -> FoundStates:
    """Find the states to resume from, by label; none for a run that starts from the beginning.

    `names` are those of each adapter's files, None without an output folder. For a sweep, take the latest step for
    which every adapter still running has a state. `clears` deletes what killed runs left half-written. Raises UserError
    if states exist but no such step, or if another process finds other states.
    """
    adapters = {label: own for label, own in names.items() if own is not None}
    for own in adapters.values() if clears and processes.is_main else ():
        clear_up(own)
    if "" in names:  # without a sweep
        manifest = find_state(options, hub, names[""], processes)
        return FoundStates({} if manifest is None else {"": manifest})
    states = newest_of_all(options, adapters) if processes.is_main else {}
    shared = processes.share("states", json.dumps({label: str(manifest.path) for label, manifest in states.items()}))
    if not processes.is_main:
        states = {label: read_manifest(Path(path)) for label, path in json.loads(shared).items()}
    # On another machine the same paths may hold other states.
    processes.require_same("the states", f"those of step {[manifest.step for manifest in states.values()]}")
    if not states:
        return FoundStates({})
    seed = read_record(next(iter(states.values()))).seed
    return FoundStates(states, SweepRecord(seed, find_ended(states.values())))


def newest_of_all(options: StateOptions, adapters: Mapping[str, Names]) -> dict[str, StateManifest]:
    """Find complete states of the latest step that all adapters have, as seen by this process.

    Raises UserError if states exist but no such step, because starting from the beginning would overwrite them.
    """
    if options.resume:
        chosen = find_states_of_step(Path(options.resume), adapters)
        missing = [label for label in adapters if label not in {**chosen, **find_ended(chosen.values())}]
        if missing:
            raise UserError.about(
                "--resume",
                f"{options.resume}: there is no whole state of that step of {', '.join(missing)}; name a "
                "state of a step of which every adapter of --sweep has one",
            )
        for manifest in chosen.values():
            require_undamaged(manifest)
        return chosen
    if not options.autoresume:
        return {}
    states: dict[str, dict[int, StateManifest]] = {}
    for label, names in adapters.items():
        # Of two states of one step the one after which less is left to do.
        found_states = sorted(iterate_states(names.folder, names.starts), key=lambda manifest: len(manifest.done))
        states[label] = {manifest.step: manifest for manifest in found_states}
    for step in sorted({step for steps in states.values() for step in steps}, reverse=True):
        chosen = {label: steps[step] for label, steps in states.items() if step in steps}
        if all(label in {**chosen, **find_ended(chosen.values())} for label in adapters) and are_undamaged(
            chosen.values()
        ):
            return chosen
    if not any(states.values()):
        logger.info("--autoresume: there is no state of an adapter of --sweep; starting from the beginning")
        return {}
    folder = next(iter(adapters.values())).folder
    steps_found = ", ".join(f"{label}: {sorted(steps) or 'none'}" for label, steps in states.items())
    raise UserError.about(
        "--autoresume",
        ": the adapters of --sweep have no undamaged states of a common step in --output_dir "
        f"{folder} (steps with a state: {steps_found}). Restore the missing states, or move all of them to another "
        "folder to start from the beginning.",
    )


def find_states_of_step(named: Path, adapters: Mapping[str, Names]) -> dict[str, StateManifest]:
    """Return the states of the same step as the named one, by adapter label. Raises UserError for a state of no
    adapter."""
    names = {label: adapter.starts[0] for label, adapter in adapters.items()}
    own_name = next((name for name in names.values() if is_state_name(named.name, (name,))), None)
    if own_name is None:
        raise UserError.about(
            "--resume",
            f"{named} is no state of an adapter of --sweep: name one of them, such as "
            f"{next(iter(names.values()))}-step00000010-state, and the others are found beside it",
        )
    step = read_manifest(named).step
    suffix = named.name.removeprefix(own_name)
    states = {}
    for label, name in names.items():
        folder = named.with_name(f"{name}{suffix}")
        if folder.is_dir() and (manifest := read_manifest(folder)).step == step:
            states[label] = manifest
    return states


def find_ended(states: Iterable[StateManifest]) -> dict[str, Ended]:
    """Return the adapters that had ended, according to the latest of these states."""
    ended: dict[str, Ended] = {}
    for manifest in states:
        ended |= read_record(manifest).ended
    return ended


def read_record(manifest: StateManifest) -> SweepRecord:
    """Read the sweep's record from a state. Raises UserError for the state of a run without a sweep."""
    if PART not in manifest.parts:
        raise UserError.about(
            "--resume", "is the state of a run without --sweep; leave --sweep out to go on from it", path=manifest.path
        )
    return SweepRecord.of(load_tree(manifest.parts[PART], {}))
