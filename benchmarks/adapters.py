"""Measure the cost of each adapter kind, forward and backward, relative to the frozen layer alone.

The plain implementations are measured too: LoRA as three separate operations, and DoRA that builds the changed weight.
All implementations of a layer take turns, so that a busy machine slows all of them alike; the median of the rounds
counts. Memory is counted: the peak of the tensors of one forward and backward pass beside the weights.

    python -m benchmarks adapters
    python -m benchmarks adapters --shapes sd15 flux --rank 16 --device cuda --dtype bf16
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from library.memory.planner.counter import OperationCounter
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Delta
from networks.core.changes.dora import EPS, Decompose, DoRA
from networks.core.changes.low_rank import LowRank
from networks.core.changes.tucker import Tucker
from networks.core.kinds.boft import make_fresh as fresh_boft
from networks.core.kinds.dylora import NestedRank
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import make_fresh as fresh_lokr
from networks.core.kinds.lora_fa import frozen_down
from networks.core.kinds.oft_v2 import make_fresh as fresh_oft
from networks.core.targets.targets import adaptation_kind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """One layer, and the shape of its input in training."""

    name: str
    make: Callable[[], Any]
    input_shape: tuple[int, ...]


def of_linear(outputs: int, inputs: int, tokens: int) -> Shape:
    name = f"linear {outputs}x{inputs}, {tokens} tokens"
    return Shape(name, lambda: nn.Linear(inputs, outputs), (1, tokens, inputs))


def of_conv(channels: int, side: int) -> Shape:
    name = f"conv 3x3 {channels}, {side}x{side} pixels"
    return Shape(name, lambda: nn.Conv2d(channels, channels, 3, padding=1), (1, channels, side, side))


SHAPES: Mapping[str, list[Shape]] = {
    "quick": [of_linear(320, 320, 1024), of_linear(768, 768, 77), of_conv(64, 32)],
    "sd15": [
        of_linear(320, 320, 4096), of_linear(2560, 320, 4096), of_linear(1280, 1280, 256), of_linear(768, 768, 77),
        of_conv(320, 64), of_conv(1280, 16),
    ],
    "flux": [of_linear(3072, 3072, 4608), of_linear(3072, 12288, 4608), of_linear(21504, 3072, 4608)],
}  # fmt: skip


class NaiveLora(nn.Module):
    """LoRA as separate operations: base(x) + up(down(x)) * scale."""

    def __init__(self, layer: Any, delta: LowRank, scale: float) -> None:
        super().__init__()
        self.base = layer.forward
        self.lora_down, self.lora_up, self.scale = delta.lora_down, delta.lora_up, scale

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        return base + self.lora_up(self.lora_down(x)) * self.scale


class MaterialisedDora(nn.Module):
    """DoRA that builds the weight m (W0 + dW) / |W0 + dW| in every call."""

    def __init__(self, layer: Any, delta: LowRank, scale: float) -> None:
        super().__init__()
        self.layer, self.lora_down, self.lora_up, self.scale = [layer], delta.lora_down, delta.lora_up, scale
        self.dora_scale = nn.Parameter(Decompose(layer.weight).magnitudes())

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        up, down = self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)
        whole = layer.weight + (up @ down).view(layer.weight.shape) * self.scale
        norm = torch.linalg.vector_norm(whole, dim=[d for d in range(whole.dim()) if d != 1], keepdim=True)
        weight = self.dora_scale * whole / (norm + EPS)
        if isinstance(layer, nn.Linear):
            return linear(x, weight, layer.bias)
        return conv2d(x, weight, layer.bias, layer.stride, layer.padding)


@dataclass(frozen=True)
class Way:
    """One implementation of the layer, with or without an adapter."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]


def ours(name: str, layer: Any, delta: Delta, decomposition: Any = None, has_scalar: bool = False) -> Way:
    """Return one of our adapters that adds `delta` to the weight; `decomposition` makes it a DoRA."""
    if decomposition is not None:
        return perturb(name, layer, DoRA(layer, delta, float(delta.rank), decomposition))
    return perturb(name, layer, ScaledDelta(layer, delta, float(delta.rank), has_scalar=has_scalar))


def perturb(name: str, layer: Any, change: Any) -> Way:
    """Return a change whose parameters are moved slightly from their initial values, without installing it."""
    change = change.to(layer.weight.device)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    base = layer.forward
    return Way(name, lambda x: change.forward(x, base, 1.0), list(change.parameters()))


def ways(layer: Any, rank: int) -> list[Way]:
    """Return the implementations to compare: the plain layer first, then every adapter kind."""
    device = layer.weight.device

    def low_rank() -> LowRank:
        return LowRank(layer, rank).to(device)

    naive, built = NaiveLora(layer, low_rank(), 1.0), MaterialisedDora(layer, low_rank(), 1.0)
    nested = NestedRank(layer, rank).to(device)
    nested.use_rows(0, max(rank // 2, 1))
    found = [
        Way("layer alone", layer.forward, []),
        Way("LoRA, three operations", naive, list(naive.parameters())),
        ours("LoRA", layer, low_rank()),
        ours("LoRA with a strength", layer, low_rank(), has_scalar=True),
        ours("LoRA-FA", layer, frozen_down(layer, rank)),
        ours("DyLoRA at half rank", layer, nested),
        ours("LoHa at rank 4", layer, LoHa(layer, 4)),
        ours("LoKr", layer, fresh_lokr(layer, rank)),
        ours("LoKr, factor 8", layer, fresh_lokr(layer, rank, 8)),
        ours("LoHa at rank 32", layer, LoHa(layer, 32)),
        perturb("OFT, blocks of 32", layer, fresh_oft(layer, 32)),
        perturb("BOFT, blocks of 4", layer, fresh_boft(layer, 4)),
        perturb("BOFT, blocks of 4, two factors", layer, fresh_boft(layer, 4, num_factors=2)),
        Way("DoRA, weight built", built, list(built.parameters())),
        ours("DoRA", layer, low_rank(), Decompose(layer.weight)),
        ours("DoRA, constant norm", layer, low_rank(), Decompose(layer.weight, has_constant_norm=True)),
    ]
    if adaptation_kind(layer) == "conv":
        found.append(ours("Tucker", layer, Tucker(layer, rank).to(device)))
        found.append(ours("Tucker with DoRA", layer, Tucker(layer, rank).to(device), Decompose(layer.weight)))
    return found


def one_pass(way: Way, x: Tensor, gradient: Tensor, autocast: Callable[[], Any]) -> None:
    """Compute forward and backward pass, with gradients of the input and all trained parameters."""
    with autocast():
        y = way.forward(x)
    torch.autograd.grad(y, [x, *way.parameters], gradient.to(y.dtype))


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], None], kept: list[Tensor]) -> int:
    """Return the peak of the memory that a call needs beside tensors that are there before it."""
    counter = OperationCounter()
    counter.leave_out(kept)
    with counter:
        call()
    return counter.peak


def measure(shape: Shape, args: argparse.Namespace) -> list[str]:
    """Return the lines of one layer's table."""
    torch.manual_seed(1)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    layer = shape.make().requires_grad_(False).to(device, dtype)
    x = torch.randn(shape.input_shape, device=device, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))

    def autocast() -> Any:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    found = ways(layer, args.rank)
    calls = {way.name: (lambda way=way: one_pass(way, x, gradient, autocast)) for way in found}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(args.rounds):
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
    middle = {name: statistics.median(values) for name, values in times.items()}
    kept = [x, gradient, *layer.parameters(), *(parameter for way in found for parameter in way.parameters)]
    memory = {name: peak_bytes(call, kept) for name, call in calls.items()}
    alone, lora = middle["layer alone"], middle["LoRA"]
    lines = [
        f"{shape.name}, rank {args.rank}, {args.dtype} on {device.type}: the layer alone takes {alone * 1e3:.2f} ms"
    ]
    for name in calls:
        lines.append(
            f"  {name:24} time {middle[name] / alone:5.2f} of the layer, {middle[name] / lora:5.2f} of LoRA; "
            f"memory {memory[name] / 2**20:8.2f} MiB, {memory[name] / memory['layer alone']:5.2f} of the layer"
        )
    return lines


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["quick"], help="which layers")
    parser.add_argument("--rank", type=int, default=16, help="rank of every adapter")
    parser.add_argument("--rounds", type=int, default=15, help="how often each way is timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="dtype of the layer and its input")
    return parser


def measure_all(args: argparse.Namespace) -> None:
    for name in args.shapes:
        for shape in SHAPES[name]:
            sys.stdout.write("\n".join(measure(shape, args)) + "\n")
            sys.stdout.flush()


main = measurement(setup_parser, measure_all)
