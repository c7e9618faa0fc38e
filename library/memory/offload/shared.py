"""Masters of which the processes of one machine have one copy together: files that all of them map into memory."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from library.memory.offload.streamed import MakeMaster

IN_MEMORY = Path("/dev/shm")  # where Linux keeps files in main memory
SHARE = 0.9  # of a place that may be taken


def place_for(num_bytes: int) -> str | None:
    """The folder in main memory where it has room for as much; None for the ordinary one, whose files the system keeps
    in main memory too while it has some, but also writes out."""
    if IN_MEMORY.is_dir() and num_bytes < SHARE * shutil.disk_usage(IN_MEMORY).free:
        return str(IN_MEMORY)
    return None


def shared_masters(folder: Path, is_first: bool) -> MakeMaster:
    """Masters in files of `folder`: the first process makes them, the others find them filled."""

    def make(block: int, num_bytes: int) -> tuple[Tensor, bool]:
        path = folder / f"block_{block}"
        if is_first:
            with path.open("wb") as file:
                file.truncate(num_bytes)
        return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8), not is_first

    return make
