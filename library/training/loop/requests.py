"""Requests to a run that trains: empty files in its output folder, which it answers and deletes after the step."""

from dataclasses import dataclass
from pathlib import Path

DRAW_NOW, SAVE_NOW = "-draw-now", "-save-now"  # after the output name


@dataclass(frozen=True)
class Requests:
    """Requests to a running training: to draw or to save after the current step, besides its schedule."""

    draws: bool = False
    saves: bool = False

    def __bool__(self) -> bool:
        return self.draws or self.saves


def take_request(path: Path) -> bool:
    """Return True if the file of a request is there, and delete it."""
    try:
        if path.stat().st_size:
            return False  # a file of the user's
        path.unlink()
    except (FileNotFoundError, PermissionError):  # on Windows another program may not have closed it yet
        return False
    return True
