"""Memory, arithmetic and bus speeds of GPUs, as published. Needs no torch."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

from library.base.errors import about

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
# tiny models take 23 to 32 microseconds per kernel on a server's CPU; benchmarks/RESULTS.md has published times.
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
    launch: float = LAUNCH_S  # seconds from the start of a small kernel to that of the next
    compiles_bf16: bool = True

    def pinned_bytes(self, num_bytes: int, share: float = 1.0) -> int:
        """Return how many bytes can be pinned within a share of `pinnable_bytes`."""
        return num_bytes if self.pinnable_bytes is None else min(num_bytes, int(share * self.pinnable_bytes))

    def copy_seconds(self, num_bytes: int, num_pinned: int) -> float:
        """Return the seconds to copy bytes between main memory and the GPU. Those that are not pinned are staged."""
        return num_pinned / self.bus + (num_bytes - num_pinned) / min(self.bus, self.staging)


@dataclass(frozen=True)
class Card:
    """A GPU as its vendor describes it. Sources: the vendors' data sheets."""

    name: str
    memory_gb: tuple[int, ...]  # several where it is sold with different amounts; empty where any is possible
    peak: float  # dense 16-bit FLOP/s, with float32 accumulation where the vendor names it
    bandwidth: float  # bytes per second
    bus: float  # bytes per second from main memory, as measured in practice for its PCIe generation and lanes

    def gpu(self, memory_bytes: int) -> Gpu:
        """Return the speeds that a training step reaches: 60 % of the arithmetic and 80 % of the bandwidth."""
        speeds = REACHED * self.peak, self.bus, 0.8 * self.bandwidth
        return Gpu(self.name, memory_bytes, *speeds, compiles_bf16=self.name not in BEFORE_AMPERE)


GEN3, GEN4_X8, GEN4, GEN5 = 12.5e9, 12.5e9, 24e9, 50e9


def _cards(bus: float, *rows: tuple[str, int | tuple[int, ...], float, float]) -> Iterator[Card]:
    """Yield cards of a bus: name, memory in GB, peak in TFLOP/s, bandwidth in GB/s."""
    for name, memory, peak, bandwidth in rows:
        yield Card(name, memory if isinstance(memory, tuple) else (memory,), peak * 1e12, bandwidth * 1e9, bus)


CARDS = (
    *_cards(
        GEN5, ("B200", 180, 2250, 8000), ("GH200", 96, 989, 4000), ("H200", 141, 989, 4800),
        ("H100 PCIe", 80, 756, 2000), ("H100 NVL", 94, 835, 3900), ("H100", 80, 989, 3350),
        ("RTX 5090", 32, 210, 1792), ("RTX 5080", 16, 113, 960), ("RTX 5070 Ti", 16, 88, 896),
        ("RTX 5070", 12, 61.7, 672), ("RX 9070 XT", 16, 195, 640), ("RX 9070", 16, 145, 640),
        ("MI300X", 192, 1307, 5300),
    ),
    *_cards(
        GEN4, ("RTX 5060 Ti", (8, 16), 47.4, 448), ("RTX 5060", 8, 38.4, 448), ("A100", (40, 80), 312, 1555),
        ("A800", 80, 312, 2039), ("A10G", 24, 70, 600), ("A10", 24, 125, 600), ("A40", 48, 150, 696),
        ("RTX A6000", 48, 155, 768), ("RTX 6000 Ada", 48, 364, 960), ("L40S", 48, 362, 864), ("L40", 48, 181, 864),
        ("L4", 24, 121, 300), ("RTX 4090", 24, 165, 1008), ("RTX 4080 SUPER", 16, 104, 736),
        ("RTX 4080", 16, 97.5, 717), ("RTX 4070 Ti SUPER", 16, 88, 672), ("RTX 4070 Ti", 12, 80, 504),
        ("RTX 4070 SUPER", 12, 71, 504), ("RTX 4070", 12, 58, 504), ("RTX 3090 Ti", 24, 80, 1008),
        ("RTX 3090", 24, 71, 936), ("RTX 3080 Ti", 12, 68, 912), ("RTX 3080", (10, 12), 60, 760),
        ("RTX 3070 Ti", 8, 43.5, 608), ("RTX 3070", 8, 40.6, 448), ("RTX 3060 Ti", 8, 32.4, 448),
        ("RTX 3060", (8, 12), 25.5, 360), ("RX 7900 XTX", 24, 123, 960), ("RX 7900 XT", 20, 103, 800),
        ("RX 7800 XT", 16, 74.6, 624), ("Arc A770", (8, 16), 137, 560),
    ),
    *_cards(GEN4_X8, ("RTX 4060 Ti", (8, 16), 44, 288), ("RTX 4060", 8, 30, 272), ("Arc B580", 12, 117, 456)),
    *_cards(GEN3, ("V100", (16, 32), 125, 900), ("T4", 16, 65, 320), ("RTX 2080 Ti", 11, 53.8, 616)),
    # Apple's processors share their memory with the GPU, so nothing is copied over a bus.
    *_cards(
        200e9, ("M1 Max", (), 10.4, 400), ("M2 Max", (), 13.6, 400), ("M3 Max", (), 14.2, 400),
        ("M4 Max", (), 18.4, 546), ("M2 Ultra", (), 27.2, 800), ("M3 Ultra", (), 28.2, 819),
    ),
)  # fmt: skip
BEFORE_AMPERE = ("V100", "T4", "RTX 2080 Ti")  # which only emulate bf16
BRANDS = re.compile(r"\b(nvidia|geforce|amd|radeon|intel|apple|gpu)\b")


def spelling(name: str) -> str:
    """Return a name without brand, spaces and case, for comparison."""
    return re.sub(r"[\s-]+", "", BRANDS.sub("", name.lower()))


def find_card(name: str) -> Card | None:
    """Return the card of a name as people write it: "RTX 4070 Ti Super", "3060", "7900 XTX"; None for others."""
    wanted = spelling(name)
    for card in CARDS:
        full = spelling(card.name)
        if wanted in (full, re.sub(r"^(rtx|rx|arc)", "", full)):
            return card
    return None


def parse_cards(text: str) -> list[Gpu]:
    """Return the GPUs of a name, a name with a size, or a size: "RTX 3060 12GB", "4090", "12GB".

    A name without a size gives a GPU for each amount of memory that it is sold with. Raises UserError for a name that
    is not known, and for one that comes with any amount.
    """
    match = re.fullmatch(r"(.*?)\s*\b(\d+(?:\.\d+)?\s*(?:gb|gib|mb|mib))", text.strip(), re.IGNORECASE)
    name, size = (match[1], match[2]) if match else (text.strip(), "")
    card = find_card(name) if name else None
    if card is None and re.fullmatch(r"\d{1,3}", name):
        name, size = "", name  # "24" is a size
    if not name:
        return [typical_gpu(parse_size("--cards", size))]
    if card is None:
        raise about("--cards")(f": {text!r} is not known", "give its memory, such as 24GB")
    if not size and not card.memory_gb:
        raise about("--cards")(f": {text!r} comes with any amount of memory", f"write {card.name} 64GB")
    sizes = [parse_size("--cards", text) for text in ([size] if size else [f"{gb}GB" for gb in card.memory_gb])]
    return [
        replace(card.gpu(size.free_bytes), nominal_bytes=size.num_bytes if size.names_gpu else None) for size in sizes
    ]


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


SYSTEMS = LINUX, WINDOWS = "linux", "windows"


def find_system() -> str:
    """Return how this machine runs fused operations: as Linux, or as Windows without Triton."""
    is_bare = platform.system() == "Windows" and find_spec("triton") is None
    return WINDOWS if is_bare else LINUX


def fuses(gpu: Gpu, system: str, mixed_precision: str = "bf16") -> bool:
    """Return True if operations are fused on a GPU."""
    return system == LINUX and (gpu.compiles_bf16 or mixed_precision != "bf16")


def parse_size(flag: str, text: str) -> MemorySize:
    """Parse a memory size. A gigabyte is 2**30 bytes, as in the names of GPUs.

    A whole number of gigabytes, such as "12GB" or "12", is the nominal size of a GPU. "11500MB", "12GiB" and "11.5GB"
    are exact. Raises UserError naming `flag` for anything else, and for more memory than any GPU has.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise about(flag)(f": {text!r} is not a memory size", "use e.g. 12GB or 11500MB")
    num_bytes = float(match[1]) * UNITS[match[2]]  # infinite for hundreds of digits
    if num_bytes > LARGEST_GPU:
        raise about(flag)(f": {text[:40]!r} is {num_bytes / GIB:g} GiB, more than any GPU has", "use e.g. 24GB")
    return MemorySize(round(num_bytes), "." not in match[1] and match[2] in NAMES_A_GPU)


# Common GPUs by memory, the smallest first.
TYPICAL = tuple(
    card.gpu(memory * GIB)
    for name, memory in (
        ("RTX 4060", 8), ("RTX 4070", 12), ("RTX 4060 Ti", 16), ("RTX 3090", 24), ("RTX 5090", 32), ("H100", 80),
    )
    for card in CARDS
    if card.name == name
)  # fmt: skip


def typical_gpu(size: MemorySize) -> Gpu:
    """Return a common GPU with about this memory: the largest that does not have more, or the smallest."""
    smaller = [gpu for gpu in TYPICAL if reported_bytes(gpu.memory_bytes) <= size.num_bytes]
    closest = smaller[-1] if smaller else TYPICAL[0]
    return replace(closest, memory_bytes=size.free_bytes, nominal_bytes=size.num_bytes if size.names_gpu else None)
