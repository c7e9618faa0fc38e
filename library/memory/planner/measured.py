"""Speeds of the devices of this machine."""

import re
import time
from collections.abc import Callable

import psutil
import torch
from torch import nn

from library.memory.pinned import empty_host_copy, max_pinned_bytes
from library.memory.planner.counter import OperationCounter
from library.memory.planner.gpus import CARDS, REACHED, Gpu

BUSY_S = 0.5  # an idle GPU has low clocks, which take a few tenths of a second to rise


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a GPU's peak FLOP/s, or None without CUDA.

    For 16 bits it is the vendor's figure, if known, otherwise that of one large product.
    """
    if device.type != "cuda":
        return None
    if dtype in (torch.bfloat16, torch.float16):
        device_name = torch.cuda.get_device_name(device)
        for card in CARDS:
            if re.search(rf"(?<!\w){re.escape(card.name)}(?!\w)", device_name, re.IGNORECASE):  # an A4000 is no A40
                return card.peak
    # The benchmark reports the share that a whole step reaches; the peak is the speed of the product itself.
    return benchmark_gpu(device, 0, dtype).flops / REACHED


def benchmark_gpu(device: torch.device, memory_bytes: int, dtype: torch.dtype, side: int = 4096) -> Gpu:
    """Measure this device with one large product, with copies from main memory, within it and within the device, and
    with a step of small kernels.

    This takes about 0.2 s, and a GPU computes for half a second before.
    """
    on_gpu = device.type != "cpu"

    def seconds(run: Callable[[], object]) -> float:
        run()  # warm-up
        best_s = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.accelerator.synchronize(device)
            best_s = min(best_s, time.perf_counter() - start)
        return best_s

    matrix = torch.randn(side, side, dtype=dtype, device=device)
    host = empty_host_copy(matrix) if on_gpu else torch.empty_like(matrix)
    busy_from = time.perf_counter()
    while on_gpu and time.perf_counter() - busy_from < BUSY_S:
        seconds(lambda: matrix @ matrix)
    product_s = seconds(lambda: matrix @ matrix)
    num_bytes = host.numel() * host.element_size()
    copy_s = seconds(lambda: matrix.copy_(host, non_blocking=True))
    clone_s = seconds(lambda: matrix.clone())  # read and written
    pageable = torch.empty(side, side, dtype=dtype)
    staged_s = seconds(lambda: pageable.copy_(host))
    step, num_launches = make_small_step(device, dtype)
    other_name = device.type.upper() if on_gpu else "this processor"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else other_name
    return Gpu(
        name,
        memory_bytes,
        flops=REACHED * 2 * side**3 / product_s,
        bus=num_bytes / copy_s,
        bandwidth=2 * num_bytes / clone_s,
        pinnable_bytes=max_pinned_bytes(),
        main_memory_bytes=psutil.virtual_memory().available,
        staging=num_bytes / staged_s,
        launch=seconds(step) / num_launches,
    )


def make_small_step(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Return a forward and backward pass whose kernels are too small to take time, and their number."""
    blocks = (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(32))
    model = nn.Sequential(*blocks).to(device, dtype).requires_grad_(False)
    inputs = torch.ones(4, 64, device=device, dtype=dtype, requires_grad=True)

    def step() -> None:
        model(inputs).sum().backward()

    with OperationCounter() as counter:
        step()
    return step, counter.launches
