"""Pinning of the buffers that hold offloaded blocks."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.memory.pinned import MOST, clear_last_error, pinning_limit

# Share of what can be pinned for offloaded weights, where block inputs are offloaded too. Unpinned weights are staged
# by a thread, while the host waits for unpinned inputs.
SHARE_BESIDE_INPUTS = 0.5


@dataclass(frozen=True)
class Pinned:
    """The result of pinning some buffers."""

    addresses: frozenset[int]  # of the pinned buffers
    reason: str | None = None  # why the others are not pinned


def pin(masters: Sequence[Tensor], reserve: int = 0, share: float = 1.0) -> Pinned:
    """Pin buffers in place for their lifetime, until the system refuses or `share` of 40 % of main memory is pinned.

    The pinned ones are spread over the sequence, so that unpinned ones do not follow each other. If the system refuses,
    some are unpinned again, so that `reserve` bytes and the rest of the share can still be pinned.
    """
    limit, pinned_bytes, reason = int(share * pinning_limit()), 0, None
    pinned: list[Tensor] = []
    # torch's own pinned memory comes in powers of two, up to twice the requested size.
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for master in (masters[i] for i in spread_order(len(masters))):
        if pinned_bytes + len(master) > limit:
            reason = f"{sum(map(len, masters)) / 1e9:.1f} GB is more than {share * MOST:.0%} of main memory"
            break
        status = runtime.cudaHostRegister(master.data_ptr(), len(master), 0)
        if int(status) != 0:
            clear_last_error()
            reason = f"cudaHostRegister failed: {runtime.cudaGetErrorString(status)}"
            # The other buffers are staged, for which `reserve` bytes must be pinned: WSL2 pins 0.5 to 1 GiB in total.
            reserve += int((1 - share) * pinned_bytes)
            while pinned and reserve > 0:
                reserve -= len(pinned[-1])
                runtime.cudaHostUnregister(pinned.pop().data_ptr())
            break
        pinned_bytes += len(master)
        pinned.append(master)
    # Memory that is freed while pinned stays registered, so a later buffer at its address cannot be pinned, for example
    # when --fit makes several rings. At exit the system unpins everything.
    for master in pinned:
        weakref.finalize(master, unpin, master.data_ptr()).atexit = False
    return Pinned(frozenset(master.data_ptr() for master in pinned), reason)


def spread_order(count: int) -> list[int]:
    """Return the numbers below `count`, in an order with evenly spread prefixes: 0, 4, 2, 6, 1, 5, 3, 7."""
    num_bits = max(1, (count - 1).bit_length())
    return [n for n in (int(f"{i:0{num_bits}b}"[::-1], 2) for i in range(2**num_bits)) if n < count]


def unpin(address: int) -> None:
    """Unpin memory before it is freed, after the last copy from it, such as a prefetch for a discarded ring."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
