"""The adapter files that a run has saved."""

import logging
import re
from collections.abc import Hashable, Sequence
from pathlib import Path

from library.checkpoints.files import PEFT_STEM
from library.checkpoints.headers import LENGTH_BYTES, holds_safetensors, read_header, read_metadata
from library.checkpoints.marks import MARK_FIELD
from library.checkpoints.overwriting import judge
from library.training.saving.names import Names

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ABOUT_TRAINING = ("ss_", "sshs_", "modelspec.", MARK_FIELD)  # prefixes of metadata about when and how a file was made
STEP_IN_NAME = re.compile(r"-step(\d{8})$")


def files_of_run(names: Names) -> list[Path]:
    """Return the run's files, sorted by training steps, then by name; foreign files of such names are left out."""
    paths = [path for path in names.folder.glob(f"*.{names.extension}") if names.has_stem(path.stem)]
    paths = [path for path in paths if path.is_file() and judge(path, names.adapter_kind) == "ours"]
    return sorted(paths, key=lambda path: (read_num_steps(path), path.name))


def read_num_steps(path: Path) -> int:
    """Return a file's training steps, from its metadata or its name; 0 if neither has them."""
    text = read_metadata(path).get("ss_steps", "")
    in_name = STEP_IN_NAME.search(path.stem)
    return int(text) if text.isdigit() else int(in_name[1]) if in_name else 0


def drop_copies(files: Sequence[Path]) -> list[Path]:
    """Drop files with the same adapter as an earlier one, such as the final file and that of the last step.

    Tensors are compared byte for byte; metadata about training may differ.
    """
    kept: dict[Hashable, list[Path]] = {}
    distinct = []
    for path in files:
        same_outline = kept.setdefault(read_outline(path), [])
        earlier = next((other for other in same_outline if has_same_data(path, other)), None)
        if earlier is None:
            same_outline.append(path)
            distinct.append(path)
        else:
            logger.info("%s has the same adapter as %s and is skipped", path, earlier)
    return distinct


def read_outline(path: Path) -> Hashable:
    """Return what files with the same adapter have in common, without reading tensors."""
    settings = path.with_name("adapter_config.json")
    peft = settings.read_bytes() if path.stem == PEFT_STEM and settings.is_file() else b""
    if not holds_safetensors(path):
        return path.stat().st_size, peft
    header = read_header(path)
    metadata = {
        key: value
        for key, value in header.metadata.items()
        if not key.startswith(ABOUT_TRAINING) or key.startswith("ss_network_")
    }
    return frozenset(header.tensors.items()), frozenset(metadata.items()), peft


def has_same_data(path: Path, other: Path) -> bool:
    """Return True if two files are equal, except for the headers of safetensors files."""
    with path.open("rb") as first, other.open("rb") as second:
        for file, name in ((first, path), (second, other)):
            file.seek(LENGTH_BYTES + read_header(name).num_bytes if holds_safetensors(name) else 0)
        while True:
            chunk = first.read(CHUNK_BYTES)
            if chunk != second.read(CHUNK_BYTES):
                return False
            if not chunk:
                return True
