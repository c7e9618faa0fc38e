"""Simulated GPUs for this process, which `torch.cuda` uses after `insert`.

The extension provides the device, its streams, memory and operations. This module has the `torch.cuda` functions that a
CPU build lacks, and tells the extension in which order host threads act.
"""

import contextlib
import functools
import importlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests import nondeterministic_operations
from tests.simulated_gpu.build import extension

GIB = 2**30
NAMES = {7.5: "NVIDIA GeForce RTX 2080", 8.6: "NVIDIA GeForce RTX 3090", 8.9: "NVIDIA GeForce RTX 4060"}


@dataclass(frozen=True)
class Settings:
    """Settings of the simulated GPUs. Their number cannot change after the first use in a process."""

    num_gpus: int = 1
    memory_bytes: int = 8 * GIB  # of each
    pin_limit_bytes: int = 1 << 40  # limit of pinned memory; about one GiB under WSL2
    capability: float = 8.9
    has_atomics: bool = False  # dQ of attention has noise in its last bit, except in deterministic mode


@dataclass(frozen=True)
class Fault:
    """A mistake that may give wrong numbers on a GPU."""

    kind: str  # see README.md
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Simulation:
    """The simulated GPUs of this process, with the faults and waits they recorded."""

    def __init__(self, extension: ModuleType, settings: Settings) -> None:
        self.extension, self.settings = extension, settings
        self._configure()

    def _configure(self) -> None:
        s = self.settings
        self.extension.configure(s.num_gpus, s.memory_bytes, s.pin_limit_bytes, s.capability)

    @contextlib.contextmanager
    def configured(self, **changes: Any) -> Iterator[None]:
        """Change settings inside the block."""
        before = self.settings
        self.settings = replace(before, **changes)
        self._configure()
        try:
            yield
        finally:
            self.settings = before
            self._configure()

    def limit_memory(self, num_bytes: int) -> None:
        """Limit the allocator without changing the GPU's total memory."""
        self.extension.configure(
            self.settings.num_gpus, num_bytes, self.settings.pin_limit_bytes, self.settings.capability
        )

    def clear(self) -> None:
        """Wait for every GPU, then clear the records."""
        for index in range(self.settings.num_gpus):
            self.extension.synchronize(index)
        self.extension.clear_reports()

    def faults(self) -> list[Fault]:
        """Return the distinct faults since `clear`, in order of occurrence."""
        return [Fault(*found) for found in self.extension.reports()]

    def waits(self) -> Counter[str]:
        """Return how often the host waited for a GPU, by operation and place."""
        return Counter(self.extension.waits())

    def attention(self) -> Counter[str]:
        """Return how often attention was computed, by the kernel that CUDA would choose, and place.

        Calls that fall back to the math kernel, which stores all scores, begin with "math:" and the shapes.
        """
        return Counter(self.extension.attention())

    def stats(self, index: int = 0) -> dict[str, int]:
        """Return the memory statistics of one GPU and of shared memory, in bytes."""
        return dict(self.extension.stats(index))


def insert(settings: Settings = Settings()) -> Simulation:
    """Insert the GPUs before anything asks torch for one. They cannot be removed again."""
    with contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")  # without a visible GPU it would choose its CPU kernels
    simulation = Simulation(extension(), settings)
    simulation.extension.refuse_in_deterministic_mode(set(nondeterministic_operations.names()))
    replace_torch_cuda(simulation)
    order_threads(simulation.extension)
    watch_reads(simulation.extension)
    add_in_any_order(simulation)
    replace_nccl(simulation.extension)
    return simulation


class Stream(torch.Stream):
    """torch.cuda.Stream."""

    def __new__(cls, device: Any = None, priority: int = 0, **parts: Any) -> "Stream":
        if "stream_id" in parts:
            return super().__new__(cls, **parts)  # type: ignore[no-any-return]
        index = None if device is None else torch.device(device).index
        index = torch.cuda.current_device() if index is None else index
        return super().__new__(cls, device=f"cuda:{index}", priority=priority)  # type: ignore[no-any-return]

    @property
    def cuda_stream(self) -> int:
        return int(self.stream_id)


class Event(torch.Event):
    """torch.cuda.Event."""

    # From the extension, as torch.Event requires exactly its own class.
    elapsed_ms: ClassVar[Callable[[int, int], float]]

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, **others: Any) -> "Event":
        return super().__new__(cls, device="cuda", enable_timing=enable_timing, blocking=blocking)  # type: ignore

    def record(self, stream: Any = None) -> None:
        super().record(torch.cuda.current_stream() if stream is None else stream)

    def wait(self, stream: Any = None) -> None:
        super().wait(torch.cuda.current_stream() if stream is None else stream)

    def elapsed_time(self, other: Any) -> float:
        return Event.elapsed_ms(self.event_id, other.event_id)


class Status(int):
    """A return value of CUDA runtime calls."""


def replace_torch_cuda(simulation: Simulation) -> None:
    """Replace the functions of `torch.cuda` by those of the simulation."""
    ext, cuda = simulation.extension, torch.cuda
    Event.elapsed_ms = staticmethod(ext.elapsed_ms)

    def index_of(device: Any = None) -> int:
        index = device if isinstance(device, int) or device is None else torch.device(device).index
        return int(ext.device_now()) if index is None else int(index)

    def stream_of(parts: tuple[int, int, int]) -> Stream:
        return Stream(stream_id=parts[0], device_index=parts[1], device_type=parts[2])

    def set_stream(stream: Any) -> None:
        if stream is not None:
            ext.set_stream(stream.stream_id, stream.device_index)

    def capability(device: Any = None) -> tuple[int, int]:
        major, minor = f"{simulation.settings.capability:.1f}".split(".")
        return int(major), int(minor)

    def name(device: Any = None) -> str:
        known = NAMES.get(simulation.settings.capability, f"sm_{capability()[0]}{capability()[1]}")
        return f"{known} (simulated)"

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = capability()
        return SimpleNamespace(
            name=name(), major=major, minor=minor, total_memory=simulation.settings.memory_bytes, is_integrated=0,
            multi_processor_count=24, is_multi_gpu_board=0, gcnArchName=name(), warp_size=32, L2_cache_size=24 << 20,
            max_threads_per_multi_processor=1536, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
            shared_memory_per_block_optin=101376, shared_memory_per_multiprocessor=102400, uuid="simulated",
        )  # fmt: skip

    def memory_stats(device: Any = None) -> dict[str, int]:
        stats = ext.stats(index_of(device))
        return {
            "allocated_bytes.all.current": stats["allocated"],
            "allocated_bytes.all.peak": stats["peak_allocated"],
            "active_bytes.all.peak": stats["peak_allocated"],
            "reserved_bytes.all.current": stats["reserved"],
            "reserved_bytes.all.peak": stats["peak_reserved"],
            "num_alloc_retries": stats["num_retries"],
            "num_ooms": stats["num_ooms"],
        }

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        total = simulation.settings.memory_bytes
        return total - ext.stats(index_of(device))["reserved"], total

    def stat(key: str) -> Callable[..., int]:
        return lambda device=None: ext.stats(index_of(device))[key]

    runtime = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda address, size, flags: Status(ext.register_memory(address, size)),
        cudaHostUnregister=lambda address: Status(ext.unregister_memory(address)),
        cudaMemGetInfo=mem_get_info,
        cudaGetErrorString=lambda code: {0: "no error", 2: "out of memory"}.get(int(code), f"error {int(code)}"),
    )
    new: dict[str, Any] = {
        "_is_compiled": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "cudart": lambda: runtime,
        "current_device": lambda: ext.device_now(),
        "current_stream": lambda device=None: stream_of(ext.stream_now(index_of(device))),
        "default_generators": tuple(ext.default_generator(i) for i in range(simulation.settings.num_gpus)),
        "default_stream": lambda device=None: stream_of(ext.default_stream(index_of(device))),
        "device_count": lambda: simulation.settings.num_gpus,
        "empty_cache": ext.empty_cache,
        "Event": Event,
        "get_arch_list": lambda: ["sm_{}{}".format(*capability())],
        "get_device_capability": capability,
        "get_device_name": name,
        "get_device_properties": properties,
        "init": lambda: None,
        "ipc_collect": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability()[0] >= 8,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "max_memory_allocated": stat("peak_allocated"),
        "max_memory_reserved": stat("peak_reserved"),
        "mem_get_info": mem_get_info,
        "memory_allocated": stat("allocated"),
        "memory_reserved": stat("reserved"),
        "memory_stats": memory_stats,
        "reset_peak_memory_stats": lambda device=None: ext.reset_peaks(index_of(device)),
        "set_device": lambda device: ext.set_device(index_of(device)) and None,
        "set_per_process_memory_fraction": lambda fraction, device=None: simulation.limit_memory(
            int(fraction * simulation.settings.memory_bytes)
        ),
        "set_stream": set_stream,
        "Stream": Stream,
        "synchronize": lambda device=None: ext.synchronize(index_of(device)),
    }
    for module in (cuda, cuda.streams, cuda.memory, cuda.random):
        for key, value in new.items():
            if module is cuda or hasattr(module, key):
                setattr(module, key, value)
    exchange: Callable[[int], int] = ext.set_device
    below: dict[str, Any] = {
        "_cuda_emptyCache": ext.empty_cache,
        "_cuda_exchangeDevice": exchange,
        "_cuda_getCurrentRawStream": lambda device: ext.stream_now(device)[0],
        "_cuda_getDevice": ext.device_now,
        "_cuda_getDeviceCount": lambda: simulation.settings.num_gpus,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_setDevice": ext.set_device,
        "_cuda_synchronize": lambda: ext.synchronize(ext.device_now()),
        "_has_cuda": True,
    }
    for key, value in below.items():
        setattr(torch._C, key, value)
    cuda._exchange_device = exchange
    cuda._maybe_exchange_device = lambda device: exchange(device)  # torch.compile tells the two apart by identity
    torch.backends.cuda.is_built = lambda: True
    torch.version.cuda = "12.8"
    resize = torch.UntypedStorage.resize_

    def resized(storage: Any, num_bytes: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, num_bytes)
        ext.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), num_bytes)
        return storage

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]


def order_threads(ext: ModuleType) -> None:
    """Tell the extension how threads are ordered: by start and join, and by a future's call and result.

    Other synchronisation, such as queues and locks, is not tracked, so accesses it orders are still reported.
    """
    start, bootstrap, join = threading.Thread.start, threading.Thread._bootstrap_inner, threading.Thread.join  # type: ignore[attr-defined]
    submit = ThreadPoolExecutor.submit

    def started(thread: Any) -> None:
        thread._simulated_clock = ext.clock()
        start(thread)

    def bootstrapped(thread: Any) -> None:
        ext.begin_thread(thread._simulated_clock)
        try:
            bootstrap(thread)
        finally:
            thread._simulated_clock = ext.clock()

    def joined(thread: Any, timeout: float | None = None) -> None:
        join(thread, timeout)
        if not thread.is_alive():
            ext.learn(thread._simulated_clock)

    def submitted(pool: Any, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        before = ext.clock()

        def run(*arguments: Any, **named: Any) -> Any:
            ext.learn(before)
            return function(*arguments, **named)

        return submit(pool, run, *arguments, **named)

    threading.Thread.start = started  # type: ignore[method-assign]
    threading.Thread._bootstrap_inner = bootstrapped  # type: ignore[attr-defined]
    threading.Thread.join = joined  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign]
    for name in ("set_result", "set_exception"):
        setattr(Future, name, stamp_end(ext, getattr(Future, name)))
    for name in ("result", "exception"):
        setattr(Future, name, follow_end(ext, getattr(Future, name)))


def stamp_end(ext: ModuleType, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that finishes a future, to record the clock of its thread."""

    @functools.wraps(method)
    def ends(future: Any, *arguments: Any) -> Any:
        future._simulated_clock = ext.clock()
        return method(future, *arguments)

    return ends


def follow_end(ext: ModuleType, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that waits for a future, to advance the waiting thread's clock past the recorded one."""

    @functools.wraps(method)
    def waits(future: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return method(future, *arguments, **named)
        finally:
            if hasattr(future, "_simulated_clock"):
                ext.learn(future._simulated_clock)

    return waits


def watch_reads(ext: ModuleType) -> None:
    """Tell the extension where Python reads memory that may be pinned; it tracks copies itself."""

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        @functools.wraps(method)
        def read(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if type(tensor) is Tensor and tensor.device.type == "cpu":
                ext.host_reads(tensor, name)
            return method(tensor, *arguments, **named)

        return read

    for name in ("item", "numpy", "tolist"):
        setattr(Tensor, name, watched(name))


def add_in_any_order(simulation: Simulation) -> None:
    """Add noise to the gradient of attention's query where `has_atomics`, as the atomic adds of CUDA's fused kernels.

    In torch's strict deterministic mode these kernels add in a fixed order.
    """
    attention = torch.nn.functional.scaled_dot_product_attention
    noise = torch.Generator()
    noise.seed()  # differs in each process

    def perturb(gradient: Tensor) -> Tensor | None:
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        if not simulation.settings.has_atomics or (torch.are_deterministic_algorithms_enabled() and not warns_only):
            return None
        signs = torch.rand(gradient.shape, generator=noise) * 2 - 1
        return gradient * (1 + torch.finfo(gradient.dtype).eps * signs.to(gradient.device)).to(gradient.dtype)

    @functools.wraps(attention)
    def with_noise(query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if query.device.type == "cuda" and query.requires_grad:
            query = query.view_as(query)  # the hook is for this use of the tensor alone
            query.register_hook(perturb)
        return attention(query, *arguments, **named)

    torch.nn.functional.scaled_dot_product_attention = with_noise


def replace_nccl(ext: ModuleType) -> None:
    """Give processes that request NCCL collectives on streams, whose data is transferred by gloo."""
    import torch.distributed as dist

    if not dist.is_available():
        return

    def collectives(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return ext.collectives(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)

    dist.Backend.register_backend("simulated", collectives, devices=["cuda"])
    init = dist.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **named: Any) -> Any:
        return init(None if backend is None else backend.replace("nccl", "simulated"), *arguments, **named)

    dist.init_process_group = init_process_group
    dist.distributed_c10d.init_process_group = init_process_group
