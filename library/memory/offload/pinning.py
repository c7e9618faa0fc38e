"""Pinned main memory, which a GPU reads directly."""

import weakref
from collections.abc import Sequence
from contextlib import suppress

import psutil
import torch
from torch import Tensor

MOST = 0.4  # of main memory: Windows pins at most about half, and nothing else can use pinned memory


def pin(masters: Sequence[Tensor]) -> str | None:
    """Pin buffers in place for as long as they live; return None, or the reason why none of them is pinned."""
    # torch's own pinned memory is allocated in powers of two, up to twice the requested size. Each buffer is unpinned
    # before it is freed: memory freed while pinned stays registered, and a later buffer at its address cannot be
    # pinned, as when --fit makes several rings.
    num_bytes, limit = sum(map(len, masters)), int(MOST * psutil.virtual_memory().total)
    if num_bytes > limit:
        return f"{num_bytes / 1e9:.1f} GB is more than {MOST:.0%} of main memory"
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for i, master in enumerate(masters):
        status = runtime.cudaHostRegister(master.data_ptr(), len(master), 0)
        if int(status) != 0:
            for pinned in masters[:i]:
                runtime.cudaHostUnregister(pinned.data_ptr())
            clear_last_error()
            return f"cudaHostRegister failed: {runtime.cudaGetErrorString(status)}"
    for master in masters:
        weakref.finalize(master, unpin, master.data_ptr()).atexit = False
    return None


def clear_last_error() -> None:
    """Take up the error that CUDA keeps of a refused call, which the next kernel of the run would raise."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")  # every launch of a kernel raises and clears it; torch has no other way


def unpin(address: int) -> None:
    """Unpin memory at its end, once the last copy from it, such as the prefetch of a ring that is dropped, is done."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
