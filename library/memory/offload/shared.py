"""Masters (blocks in main memory) shared by the processes of one machine, as files that all of them map into memory."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from library.memory.offload.streamed import MakeMaster

IN_MEMORY = Path("/dev/shm")  # a file system in main memory on Linux
SHARE = 0.9  # of the free space that may be used


def place_for(num_bytes: int) -> str | None:
    """Return /dev/shm if it has room, or None for the ordinary temporary folder.

    The system caches files of the temporary folder in main memory, but also writes them to disk.
    """
    if IN_MEMORY.is_dir() and num_bytes < SHARE * shutil.disk_usage(IN_MEMORY).free:
        return str(IN_MEMORY)
    return None


def share_masters(folder: Path, is_first: bool) -> MakeMaster:
    """Return a factory of masters in files of `folder`.

    The first process creates and fills them, the others map them.
    """

    def make(block: int, num_bytes: int) -> tuple[Tensor, bool]:
        path = folder / f"block_{block}"
        if is_first:
            with path.open("wb") as file:
                file.truncate(num_bytes)
        return torch.from_file(str(path), shared=True, size=num_bytes, dtype=torch.uint8), not is_first

    return make
