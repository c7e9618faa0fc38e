"""Memory, arithmetic and bus speeds of GPUs."""

import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from library.errors import UserError
from library.memory.pinned import empty_host_copy, max_pinned_bytes

GIB = 2**30
UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20}
NAMES_A_GPU = ("", "g", "gb")  # with a whole number, as in "12GB"; other sizes are exact
LARGEST_GPU = 1024 * GIB  # a larger number is the name of a GPU, such as "4090"

# Memory that the driver reports for a GPU of this nominal size. [published]
REPORTED = {8 * GIB: 7.8 * GIB, 12 * GIB: 11.76 * GIB, 24 * GIB: 23.6 * GIB}
REPORTED_SHARE = 0.98  # for all other sizes

# GPU memory used by a desktop and a browser. Windows also composes its windows there.
DESKTOP_BYTES, WINDOWS_DESKTOP_BYTES = 6 * GIB // 10, GIB
REACHED = 0.6  # share of one large product's speed that a whole step reaches [derived]

# Time between the starts of two kernels in a step of small ones: Python, autocast, autograd and the driver. Steps of
# tiny models take 23 to 32 microseconds per kernel on a server's CPU; docs/memory.md compares with published times.
LAUNCH_S = 20e-6

STAGING = 10e9  # bytes per second of one thread that copies within main memory [derived]


@dataclass(frozen=True)
class Gpu:
    """A GPU, or another compute device."""

    name: str
    memory_bytes: int  # available to a run
    flops: float  # FLOP/s that training reaches
    bus: float  # bytes per second from pinned main memory
    bandwidth: float  # bytes per second within its own memory
    nominal_bytes: int | None = None  # nominal size, if the user gave one
    pinnable_bytes: int | None = None  # of main memory; None: no limit
    main_memory_bytes: float = float("inf")  # free for offloaded weights and inputs
    staging: float = STAGING  # bytes per second through buffers, for memory that is not pinned

    def pinned_bytes(self, num_bytes: int, share: float = 1.0) -> int:
        """Return how many bytes can be pinned within a share of `pinnable_bytes`."""
        return num_bytes if self.pinnable_bytes is None else min(num_bytes, int(share * self.pinnable_bytes))

    def copy_seconds(self, num_bytes: int, num_pinned: int) -> float:
        """Return the seconds to copy bytes between main memory and the GPU. Those that are not pinned are staged."""
        return num_pinned / self.bus + (num_bytes - num_pinned) / min(self.bus, self.staging)


# Speeds of a training step from published figures: 60 % of the vendors' dense bfloat16 peak with float32 accumulation,
# 80 % of the memory bandwidth, and bus speeds as measured in practice. Not measured on a GPU here.
TYPICAL = (
    Gpu("RTX 4060", 8 * GIB, 18e12, 12.5e9, 218e9),
    Gpu("RTX 4070", 12 * GIB, 35e12, 24e9, 403e9),
    Gpu("RTX 4060 Ti 16 GB", 16 * GIB, 26e12, 12.5e9, 230e9),
    Gpu("RTX 3090", 24 * GIB, 43e12, 24e9, 749e9),
    Gpu("RTX 5090", 32 * GIB, 125e12, 50e9, 1434e9),
    Gpu("H100", 80 * GIB, 593e12, 50e9, 2680e9),
)


# Vendors' dense 16-bit FLOP/s with float32 accumulation. The first name that the device name contains counts.
PEAKS = (
    ("B200", 2250e12), ("GH200", 989e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12),
    ("H100", 989e12), ("A100", 312e12), ("A800", 312e12), ("A10G", 70e12), ("A10", 125e12), ("A40", 150e12),
    ("RTX A6000", 155e12), ("RTX 6000 Ada", 364e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("V100", 125e12), ("T4", 65e12), ("RTX 5090", 210e12), ("RTX 5080", 113e12), ("RTX 4090", 165e12),
    ("RTX 4080 SUPER", 104e12), ("RTX 4080", 97.5e12), ("RTX 4070 Ti SUPER", 88e12), ("RTX 4070 Ti", 80e12),
    ("RTX 4070 SUPER", 71e12), ("RTX 4070", 58e12), ("RTX 4060 Ti", 44e12), ("RTX 4060", 30e12),
    ("RTX 3090 Ti", 80e12), ("RTX 3090", 71e12), ("RTX 3080 Ti", 68e12), ("RTX 3080", 60e12), ("RTX 3060", 25.5e12),
)  # fmt: skip


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a GPU's peak FLOP/s, or None without CUDA.

    For 16 bits it is the vendor's figure, if known, otherwise that of one large product.
    """
    if device.type != "cuda":
        return None
    if dtype in (torch.bfloat16, torch.float16):
        device_name = torch.cuda.get_device_name(device)
        for name, flops in PEAKS:
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_name):  # an "RTX A4000" is not an A40
                return flops
    # The benchmark reports the share that a whole step reaches; the peak is the speed of the product itself.
    return benchmark_gpu(device, 0, dtype).flops / REACHED


@dataclass(frozen=True)
class MemorySize:
    """A memory size given by the user: the nominal size of a GPU, or an exact number of bytes."""

    num_bytes: int
    names_gpu: bool = False

    @property
    def free_bytes(self) -> int:
        """Bytes that a run may use."""
        return free_on_gpu(self.num_bytes) if self.names_gpu else self.num_bytes


def free_on_gpu(nominal_bytes: int) -> int:
    """Return the bytes that a run may use on a GPU of this nominal size: what the driver reports minus a desktop."""
    desktop = WINDOWS_DESKTOP_BYTES if drives_windows() else DESKTOP_BYTES
    return max(0, reported_bytes(nominal_bytes) - desktop)


def reported_bytes(nominal_bytes: int) -> int:
    """Return the memory that the driver reports for a GPU of this nominal size."""
    return int(REPORTED.get(nominal_bytes, REPORTED_SHARE * nominal_bytes))


def drives_windows() -> bool:
    """Return True if Windows drives the GPU, also under WSL2."""
    return platform.system() == "Windows" or "microsoft" in platform.release().lower()


def parse_size(flag: str, text: str) -> MemorySize:
    """Parse a memory size. A gigabyte is 2**30 bytes, as in the names of GPUs.

    A whole number of gigabytes, such as "12GB" or "12", is the nominal size of a GPU. "11500MB", "12GiB" and "11.5GB"
    are exact. Raises UserError naming `flag` for anything else, and for more memory than any GPU has.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise UserError(f"{flag}: {text!r} is not a memory size; use e.g. 12GB or 11500MB")
    num_bytes = float(match[1]) * UNITS[match[2]]  # infinite for hundreds of digits
    if num_bytes > LARGEST_GPU:
        raise UserError(f"{flag}: {text[:40]!r} is {num_bytes / GIB:g} GiB, more than any GPU has; use e.g. 24GB")
    return MemorySize(round(num_bytes), "." not in match[1] and match[2] in NAMES_A_GPU)


def typical_gpu(size: MemorySize) -> Gpu:
    """Return a common GPU with about this memory: the largest that does not have more, or the smallest."""
    smaller = [gpu for gpu in TYPICAL if reported_bytes(gpu.memory_bytes) <= size.num_bytes]
    closest = smaller[-1] if smaller else TYPICAL[0]
    return replace(closest, memory_bytes=size.free_bytes, nominal_bytes=size.num_bytes if size.names_gpu else None)


def benchmark_gpu(device: torch.device, memory_bytes: int, dtype: torch.dtype, side: int = 4096) -> Gpu:
    """Measure this device with one large product, and with copies from main memory, within it and within the device.

    This takes about 0.1 s.
    """
    on_gpu = device.type == "cuda"

    def seconds(run: Callable[[], object]) -> float:
        run()  # warm-up
        best_s = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            best_s = min(best_s, time.perf_counter() - start)
        return best_s

    matrix = torch.randn(side, side, dtype=dtype, device=device)
    host = empty_host_copy(matrix) if on_gpu else torch.empty_like(matrix)
    product_s = seconds(lambda: matrix @ matrix)
    num_bytes = host.numel() * host.element_size()
    copy_s = seconds(lambda: matrix.copy_(host, non_blocking=True))
    clone_s = seconds(lambda: matrix.clone())  # read and written
    pageable = torch.empty(side, side, dtype=dtype)
    staged_s = seconds(lambda: pageable.copy_(host))
    name = torch.cuda.get_device_name(device) if on_gpu else "this processor"
    return Gpu(
        name,
        memory_bytes,
        flops=REACHED * 2 * side**3 / product_s,
        bus=num_bytes / copy_s,
        bandwidth=2 * num_bytes / clone_s,
        pinnable_bytes=max_pinned_bytes(),
        main_memory_bytes=psutil.virtual_memory().available,
        staging=num_bytes / staged_s,
    )
