"""Which adapters and states on the disk a run wrote, and may therefore replace or delete."""

import logging
import os
import re
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from library.base.json_text import parse_json
from library.checkpoints.adapter_keys import AdapterKey
from library.checkpoints.files import load_state_dict
from library.checkpoints.folders import remove_folder
from library.checkpoints.hashes import sha256_of_tensors
from library.checkpoints.headers import holds_safetensors, read_metadata
from library.checkpoints.marks import MARK_FIELD, RUN, has_changed, mark_of, read_mark
from library.checkpoints.overwriting import FileKind, judge
from library.training.reporting.console_lines import announce
from library.training.reporting.event_stream import Events
from library.training.reporting.events import Removed
from library.training.saving.state import NETWORK_FILE, OF_SD_SCRIPTS, TENSOR_FILE, is_recorded_for
from library.training.saving.state_names import MANIFEST_FILE

logger = logging.getLogger(__name__)

OF_STATE = re.compile(
    "|".join(map(re.escape, (MANIFEST_FILE, NETWORK_FILE, TENSOR_FILE)))
    # What accelerate saves for sd-scripts, with or without DeepSpeed and FSDP.
    + r"|(pytorch_)?model(_\d+)?([-.].+)?|(optimizer|scheduler|sampler|scaler|dl_state_dict)(_\d+)?([-.].+)?"
    r"|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|zero_to_fp32\.py|latest"
)
OF_DESKTOPS = ("Thumbs.db", "desktop.ini")  # files that systems put into any folder; others begin with a dot


def adapter_kind(output_name: str | None) -> FileKind:
    """Return the kind of the adapters that runs of this name save, also those of sd-scripts."""
    return FileKind(f"an adapter that a run named {output_name or 'last'} saved", partial(is_adapter, output_name))


def is_adapter(output_name: str | None, path: Path) -> bool:
    """Return True if a weight file was saved by a training run of this name."""
    if not holds_safetensors(path):
        mark = read_mark(path)
        return mark == mark_of(RUN, path) if mark is not None else has_adapter_keys(path)
    metadata = read_metadata(path)
    # Both programs write the module always, but the name only without --no_metadata.
    recorded = metadata.get("ss_output_name", str(output_name))
    is_of_name = recorded == str(output_name) or (not output_name and recorded == "")
    return "ss_network_module" in metadata and MARK_FIELD not in metadata and is_of_name


def has_other_tensors(path: Path) -> bool:
    """Return True if another program has changed the tensors of an adapter since it was saved."""
    if not holds_safetensors(path):
        return read_mark(path) is None or has_changed(path)  # others, also sd-scripts, save no mark
    recorded = read_metadata(path).get("sshs_model_hash")
    return recorded is not None and recorded != sha256_of_tensors(path)


def move_changed(path: Path) -> None:
    """Move an adapter that another program has changed out of the way of the one that takes its name."""
    if not path.is_file() or path.stat().st_size == 0 or not has_other_tensors(path):
        return
    endings = (f".changed{'' if number == 1 else f'-{number}'}{path.suffix}" for number in count(1))
    place = next(other for ending in endings if not os.path.lexists(other := path.with_suffix(ending)))
    path.rename(place)
    logger.warning("%s was changed by another program since it was saved, and is now %s", path, place)


def has_adapter_keys(path: Path) -> bool:
    """Return True if a pickled file, which sd-scripts writes without any mark, holds an adapter. Raises UserError."""
    keys = load_state_dict(path, mmap=True)
    return bool(keys) and all(AdapterKey.parse(key) is not None for key in keys)


def state_kind(output_name: str | None, names: tuple[str, ...]) -> FileKind:
    """Return the kind of the states that runs of this name save, also those of sd-scripts.

    `names` are the prefixes of the run's file names.
    """
    called = f"a state that a run named {output_name or 'last'} saved"
    return FileKind(called, partial(is_state, names), is_folder=True)


def is_state(names: tuple[str, ...], folder: Path) -> bool:
    """Return True if a folder holds a state of a run with one of `names`, and nothing else."""
    entries = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - {*OF_DESKTOPS}
    if not entries & {MANIFEST_FILE, *OF_SD_SCRIPTS} or not all(map(OF_STATE.fullmatch, entries)):
        return False
    try:
        recorded = parse_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["options"]["output_name"]
    except (OSError, ValueError, KeyError, TypeError):  # sd-scripts records no options
        return True
    return is_recorded_for(str(recorded or ""), folder.name, names)


def count_bytes(path: Path) -> int:
    """Count the bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def remove(name: Literal["checkpoint", "state"], path: Path, kind: FileKind, events: Events) -> None:
    """Delete an outdated file, if it exists and no other program has put something else there."""
    if path.exists() and judge(path, kind) == "ours":
        if path.is_file() and has_other_tensors(path):
            logger.warning("%s is outdated, but kept: another program has changed it since it was saved", path)
            return
        announce(f"removing old {name}: {path}")
        delete(path)
        events.emit(Removed(str(path)))


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)
