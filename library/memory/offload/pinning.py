"""Main memory that a card reads by itself."""

import weakref
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

MOST = 0.4  # of main memory: Windows pins about half, and what is pinned is lost to everything else


def pin(masters: Sequence[Tensor]) -> str | None:
    """Pin buffers where they lie until they are gone; gives None, or in words why none of them is pinned.

    torch's own pinned memory comes in powers of two, up to twice of what is asked for. Memory that is given back while
    it is pinned stays taken, and what comes to lie there next cannot be pinned: --fit makes rings in turn.
    """
    num_bytes, limit = sum(map(len, masters)), int(MOST * psutil.virtual_memory().total)
    if num_bytes > limit:
        return f"{num_bytes / 1e9:.1f} GB are more than {MOST:.0%} of the main memory"
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for i, master in enumerate(masters):
        status = runtime.cudaHostRegister(master.data_ptr(), len(master), 0)
        if int(status) != 0:
            for pinned in masters[:i]:
                runtime.cudaHostUnregister(pinned.data_ptr())
            return f"the system refused it ({status})"
    for master in masters:
        weakref.finalize(master, unpin, master.data_ptr()).atexit = False
    return None


def unpin(address: int) -> None:
    """Unpin memory at its end, once the last copy from it, such as the prefetch of a ring that is dropped, is done."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
