"""The adapter files that a run has left."""

import re
from pathlib import Path

from library.checkpoints.files import read_metadata
from library.training.saving.checkpoints import Names

STEP_IN_NAME = re.compile(r"-step(\d{8})$")


def files_of_run(names: Names) -> list[Path]:
    """By the steps that they were trained, then by name; none where the folder has none of this run."""
    found = (path for path in names.folder.glob(f"*.{names.extension}") if names.has_stem(path.stem))
    return sorted(found, key=lambda path: (steps_of(path), path.name))


def steps_of(path: Path) -> int:
    """The steps that a file says it was trained, itself or in its name; 0 where neither does."""
    text = read_metadata(path).get("ss_steps", "")
    in_name = STEP_IN_NAME.search(path.stem)
    return int(text) if text.isdigit() else int(in_name[1]) if in_name else 0
