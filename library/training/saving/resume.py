"""Resuming from a state: which state, from which step, and what has changed since."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.base.atomic_files import remove_temporary
from library.base.errors import UserError, about, error_in, list_few
from library.base.formatting import format_count
from library.checkpoints.folders import remove_folder, tidy
from library.checkpoints.overwriting import judge
from library.options.base import Options
from library.options.declared import OnResume
from library.options.output.saving import HubOptions, StateOptions
from library.options.training.network import NetworkOptions
from library.processes.process_group import Processes
from library.training.config_file import SECRETS
from library.training.reporting.sample_images import FOLDER, GRID_FOLDER, is_preview_stem
from library.training.saving.hub import fetch_state
from library.training.saving.names import Names, state_folder
from library.training.saving.state import StateManifest, newest_state, read_manifest, require_undamaged
from library.training.saving.state_names import MANIFEST_FILE, is_state_name
from library.training.step.accumulation import StepPlan

logger = logging.getLogger(__name__)

EFFECTS: Mapping[OnResume | None, tuple[int, str]] = {
    "new rate": (logging.WARNING, ", which takes effect from here on: the run will differ from an uninterrupted one"),
    "new length": (
        logging.INFO,
        ": learning rates that depend on the length of the run follow the new length from here on, so the run may "
        "differ from an uninterrupted one",
    ),
    "kept by the optimizer": (
        logging.WARNING,
        ": the optimizer keeps the value in the state; to change it, start from the weights with --network_weights "
        "instead",
    ),
    None: (logging.WARNING, ": the run continues, but differs from an uninterrupted one"),
}


LATENTS = "latents"  # in the data of a state: how they were computed


class AlreadyComplete(Exception):
    """The state belongs to a run that is complete."""


def rates_of_state(options: Options, manifest: StateManifest | None) -> dict[str, Any]:
    """Return the state's learning rates that this run leaves at their defaults."""
    if manifest is None:
        return {}
    values, defaults = options.flat(), type(options).defaults()
    kept = {
        name: manifest.options[name]
        for name, declaration in type(options).declarations().items()
        if declaration.on_resume == "new rate"
        and values[name] == defaults[name]
        and manifest.options.get(name, values[name]) != values[name]
    }
    for name, value in kept.items():
        logger.info("--%s is not given: that of the state stays, %s", name, value)
    return kept


def alpha_of_state(network_alpha: float, manifest: StateManifest | None) -> dict[str, Any]:
    """Return the state's --network_alpha if that of this run differs, because the adapter in the state contains it."""
    alpha = network_alpha if manifest is None else float(manifest.options.get("network_alpha", network_alpha))
    if alpha == network_alpha:
        return {}
    if network_alpha == NetworkOptions.network_alpha:
        logger.info("--network_alpha is not given: that of the state stays, %g", alpha)
    else:
        logger.warning(
            "--network_alpha %g has no effect: the adapter in the state keeps its own, %g", network_alpha, alpha
        )
    return {"network_alpha": alpha}


def batches_of_state(accumulation: int, manifest: StateManifest | None, num_processes: int) -> dict[str, Any]:
    """Return the gradient accumulation with which a step averages as many batches as with the state's processes.

    A value (`accumulation`) that differs from the state's is kept. Raises UserError if the batches cannot be divided.
    """
    if manifest is None or manifest.num_processes == num_processes:
        return {}
    if accumulation != int(manifest.options.get("gradient_accumulation_steps", accumulation)):
        return {}
    total = manifest.num_processes * accumulation
    if total % num_processes:
        fitting = [str(n) for n in range(1, total + 1) if total % n == 0]
        raise error_in(path=manifest.path)(
            f"the state {manifest.path} was saved by {manifest.num_processes} processes, which averaged {total} "
            f"batches in each step; {num_processes} cannot share these out. Start {' or '.join(fitting)} processes, or "
            "set another --gradient_accumulation_steps to go on with other steps"
        )
    logger.info(
        "the state comes from %d processes and this run has %d: --gradient_accumulation_steps %d keeps the %d batches "
        "of a step",
        manifest.num_processes, num_processes, total // num_processes, total,
    )  # fmt: skip
    return {"gradient_accumulation_steps": total // num_processes}


def shares_to_store(manifest: StateManifest | None, accumulation: int, num_processes: int) -> tuple[int, int]:
    """Return the (processes, gradient accumulation) that a state of this run holds.

    While a step averages as many batches as in the state that the run goes on from, they are that state's: the same
    command line goes on from the new state as it did from that one, with any number of processes.
    """
    if manifest is not None:
        before = int(manifest.options.get("gradient_accumulation_steps", accumulation))
        if manifest.num_processes * before == num_processes * accumulation:
            return manifest.num_processes, before
    return num_processes, accumulation


def check_latents(manifest: StateManifest, computed_as: str) -> None:
    """Raise UserError for a state of an earlier version that computed latents in another way."""
    if manifest.dataset.get(LATENTS, "") != computed_as:
        raise error_in(path=manifest.path)(
            f"the state {manifest.path} is of an earlier version, which trained this base model on random samples of "
            "the VAE's latents in place of their mean",
            "start from the LoRA file with --network_weights instead",
        )


def find_state(
    options: StateOptions, hub: HubOptions, names: Names | None, processes: Processes
) -> StateManifest | None:
    """Find the named state, or the newest one if requested; None for a run that starts from the beginning.

    Raises UserError if the named folder is not a complete state, or if processes find different states.
    """
    manifest = None
    if processes.is_main:
        manifest = find_named_or_newest(options, hub, names)
    path = processes.share("state", "" if manifest is None else str(manifest.path))
    if path and not processes.is_main:
        # A named state may be downloaded, to a folder of its own on each machine.
        manifest = find_named_or_newest(options, hub, names) if options.resume else state_of_main(path)
    if path and manifest is not None:
        digest = blake2b((manifest.path / MANIFEST_FILE).read_bytes(), digest_size=8).hexdigest()
        processes.require_same("the state", f"step {manifest.step} with digest {digest}")
    return manifest


def clear_up(names: Names) -> None:
    """Remove what a killed run of this name left half-written."""
    tidy(names.folder, partial(is_state_name, names=names.starts))
    remove_temporary(names.folder, names.has_stem)
    for folder in (FOLDER, GRID_FOLDER):
        remove_temporary(names.folder / folder, partial(is_preview_stem, names.output_name))
    remove_timed_states(names)


def remove_timed_states(names: Names) -> None:
    """Remove the states of --save_every_n_minutes of a run that was killed once its last state was whole."""
    timed, end = names.list_timed_states(), state_folder(names.of_end())
    if not timed or not end.is_dir():
        return
    try:
        last = read_manifest(end)
        require_undamaged(last)
    except UserError:
        return
    newest = names.of_timed_state(last.step).name
    for path in timed:
        # Names sort by step; later ones are of a longer run that goes on from the last state.
        if "end" in last.done and path.name <= newest and judge(path, names.state_kind) == "ours":
            remove_folder(path)


def find_named_or_newest(options: StateOptions, hub: HubOptions, names: Names | None) -> StateManifest | None:
    """Find the state that the options name, or the newest one."""
    if options.resume:
        named = read_manifest(fetch_state(options.resume, hub) if hub.resume_from_huggingface else Path(options.resume))
        require_undamaged(named)
        return named
    if not (options.autoresume or options.skip_finished) or names is None:
        return None
    manifest = newest_state(names.folder, names.starts)
    if manifest is None and options.autoresume:
        logger.info("--autoresume: there is no state in %s; starting from the beginning", names.folder)
    return manifest


def state_of_main(path: str) -> StateManifest:
    """Read the state that the main process found. Raises UserError if it is not on this machine."""
    if not Path(path).is_dir():
        raise about("--autoresume")(
            f": the main process goes on from {path}, which is not on this machine",
            "copy it here, or use an --output_dir that all machines share",
        )
    return read_manifest(Path(path))


def resolve_starting_step(options: StateOptions, end: Path, plan: StepPlan, manifest: StateManifest | None) -> int:
    """Return the number of finished steps at the start: from the options, else from the state, else 0.

    `end` is the file of the finished run. A step inside an epoch restarts the epoch unless its first batches are to be
    skipped. Raises AlreadyComplete or UserError if no step is left.
    """
    step, source = (0, "") if manifest is None else (manifest.step, f"the state {manifest.path}")
    if options.initial_step is not None or options.initial_epoch is not None:
        if options.initial_step is not None:
            step, source = options.initial_step, f"--initial_step {options.initial_step}"
        else:
            assert options.initial_epoch is not None
            step = (options.initial_epoch - 1) * plan.steps_per_epoch
            source = f"--initial_epoch {options.initial_epoch}"
        steps_into_epoch = step % plan.steps_per_epoch
        if steps_into_epoch and not options.skip_until_initial_step:
            step -= steps_into_epoch
            logger.info(
                "%s lies inside epoch %d, which is trained as a whole from step %d on; --skip_until_initial_step "
                "begins inside it", source, plan.epoch_of(step), step,
            )  # fmt: skip
        if manifest is None and step:
            logger.info("%s without --resume: the learning rate schedule starts at its beginning", source)
    is_last = manifest is not None and step == manifest.step == plan.max_train_steps
    if manifest is not None and is_last and not ("end" in manifest.done and end.exists()):
        logger.info("%s is at the last step: only the final files are left to write", source)
        return step
    if step and step >= plan.max_train_steps:
        message = f"{source} is at step {step} of {plan.max_train_steps}: nothing is left to train"
        if (options.autoresume or options.skip_finished) and manifest is not None and not options.resume:
            raise AlreadyComplete(message)
        raise error_in("--max_train_steps")(
            f"{message}", "raise --max_train_steps or --max_train_epochs to train longer"
        )
    return step


def record_options(options: Options) -> dict[str, Any]:
    """Return the options to store in a state: plain values without passwords."""
    values = {name: value for name, value in options.flat().items() if name not in SECRETS}
    # Through JSON, so that values compare equal to those that are read from a state.
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def report_differences(
    manifest: StateManifest, options: Options, dataset: Mapping[str, Any], num_processes: int, paths: Sequence[str] = ()
) -> None:
    """Warn of everything that makes this run differ from the uninterrupted one.

    `paths` are the images whose `contents` the dataset lists.
    """
    for level, line in option_differences(manifest, options, num_processes):
        logger.log(level, "%s", line)
    for line in (
        *dataset_differences(manifest.dataset, dataset),
        *content_differences(manifest.dataset, dataset, paths),
    ):
        logger.warning("%s: the run continues, but differs from an uninterrupted one", line)
    accumulation = options.flat()["gradient_accumulation_steps"]
    batches_before = manifest.num_processes * int(manifest.options.get("gradient_accumulation_steps", accumulation))
    if manifest.num_processes != num_processes:
        is_same = batches_before == num_processes * accumulation
        logger.log(
            logging.INFO if is_same else logging.WARNING,
            "the state comes from %d processes and this run has %d: a step averages %s",
            manifest.num_processes,
            num_processes,
            "as many batches as before" if is_same else "other batches than before",
        )


def option_differences(manifest: StateManifest, options: Options, num_processes: int) -> Iterator[tuple[int, str]]:
    """Yield a line for every changed option that affects training."""
    now, defaults = record_options(options), type(options).defaults()
    declarations = type(options).declarations()
    compared = {name for name in declarations if not declarations[name].may_change_on_resume}
    if manifest.num_processes != num_processes:
        compared.discard("gradient_accumulation_steps")  # `report_differences` says what both together do
    for name in sorted(now.keys() & compared):
        # A state from before the option existed was trained with its default.
        before = manifest.options.get(name, json.loads(json.dumps(defaults[name], default=str)))
        if before == now[name]:
            continue
        level, effect = EFFECTS[declarations[name].on_resume]
        yield level, f"--{name} was {before} in the state and is {now[name]}{effect}"


def dataset_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    changed = [name for name in ("pictures", "captions", "settings") if before.get(name) != now[name]]
    if not changed:
        return
    # The keys of states call images pictures.
    names, counts = " and ".join(changed).replace("pictures", "images"), ""
    if now["num_pictures"]:
        counts = f"; {before.get('num_pictures')} images in {before.get('num_batches')} batches then"
        counts += f", {now['num_pictures']} in {now['num_batches']} now"
    yield f"the dataset is not the one of the state (its {names} differ{counts})"


def content_differences(before: Mapping[str, Any], now: Mapping[str, Any], paths: Sequence[str]) -> Iterator[str]:
    """Yield a line naming images whose files have changed, if the images are otherwise the same."""
    digests, others = now.get("contents"), before.get("contents")
    if not digests or not others or before.get("pictures") != now["pictures"]:
        return
    # Not strict, and without empty digests: older states lack those of masks and of references in larger files.
    digest_pairs = zip(paths, digests, others, strict=False)
    changed = [path for path, digest, other in digest_pairs if other and digest != other]
    if changed:
        yield f"{format_count(len(changed), 'image')} changed since the state was saved: {list_few(changed)}"
