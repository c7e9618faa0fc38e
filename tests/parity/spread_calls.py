"""Functions that all processes of a group call in test_spread.py."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.checkpoints.weights import Weights
from library.memory.codecs.codec import AS_IN_FILE, AsRead
from library.memory.frozen import FrozenLayer, frozen_layers, layers_in_blocks
from library.memory.offload.sharded import ShardedModel
from library.models.loading import materialise
from library.processes import Order, Processes
from library.training.models.compute import Compute
from library.training.models.frozen_models import load_frozen
from tests.parity.deep import DEEP
from tests.parity.modes import CPU, Mode, gradients, spread_over_all
from tests.parity.opened import opened_with

WIDTH, NUM_LAYERS = 1024, 12
T = TypeVar("T")


def compared(*modes: str) -> list[tuple[int, float]]:
    """For each mode how many gradients there are, and the largest difference from those of the whole model."""
    found = []
    for text in modes:
        base, form, runner, adapter = text.split("/")
        mode = Mode(base, form, "spread", runner, adapter)
        ours, theirs = gradients(mode), gradients(Mode(base, form, adapter=adapter), is_decoded=True)
        assert len(ours) == len(theirs) and any(bool(value.any()) for value in theirs[1:])
        off = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True)]
        found.append((len(ours), max(off)))
    return found


def kept() -> tuple[int, int, int]:
    """Bytes of a model's weights, those that this process keeps of them, and those that the model still has."""
    deep = DEEP["flux"]
    model = deep.frozen(71)
    sharded = spread_over_all(model, deep.stacks(model))
    assert sharded.ring is not None
    shares: list[Any] = [p for shelf in sharded.ring.masters for p in shelf.parameters()]
    left = sum(p.numel() for layer in frozen_layers(model) for p in layer.own_parts().values())
    return sharded.num_bytes, sum(share.to_local().numel() for share in shares), left


def one_alone() -> list[bool]:
    """The first process computes and the others follow, also where it fails; then all compute. Whether it is right."""
    deep = DEEP["flux"]
    model, whole = deep.frozen(72), deep.frozen(72)
    sharded = spread_over_all(model, deep.stacks(model))
    is_right = []
    for fails in (False, True, False):
        if dist.get_rank() != 0:
            sharded.follow(0)
            continue
        try:
            with torch.no_grad(), sharded.lead():
                is_right.append(torch.equal(deep.loss(model, CPU), deep.loss(whole, CPU)))
                if fails:
                    raise ValueError("drawing failed")
        except ValueError:
            pass
    with torch.no_grad():
        is_right.append(torch.equal(deep.loss(model, CPU), deep.loss(whole, CPU)))
    return is_right


def out_of_order() -> list[str]:
    """Return the errors of a step in which the processes asked for other blocks, and of one in which they did not."""
    deep = DEEP["flux"]
    processes = Processes(dist.get_rank(), dist.get_world_size(), store=None)
    said = []
    for block in (5, 5 + dist.get_rank()):
        sharded = spread_over_all(model := deep.frozen(73), deep.stacks(model))
        assert sharded.ring is not None
        sharded.ring.need(block)
        try:
            processes.exchange([], torch.zeros(0), 0, False, Order(sharded.digest, sharded.group_size))
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def peaks() -> tuple[int, int, int]:
    """Bytes of a model, and the most that main memory grew while it was read: spread, then whole."""
    values = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(74))
    names = [f"layers.{i}.weight" for i in range(NUM_LAYERS)]
    shapes = {name: (WIDTH, WIDTH) for name in names}

    def read(name: str) -> Tensor:
        return values * (1 + names.index(name))

    weights = Weights("made up", shapes, read)
    sharded = ShardedModel(CPU, dist.get_world_size(), dist.get_world_size())
    sharded.mesh  # noqa: B018
    first = grown(weights, AsRead(AS_IN_FILE, take=sharded.take))
    layers: list[Any] = list(sharded.shares)
    assert all(isinstance(layer, FrozenLayer) for layer in layers)
    assert torch.equal(layers[3].weight, read(names[3]))
    return NUM_LAYERS * WIDTH**2 * 4, first, grown(weights, None)


def grown(weights: Weights, form: Any) -> int:
    """By how much the peak of this process's main memory lies above what it had before."""
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)])
    return growth(lambda: materialise(model, weights, torch.float32, form))[0]


def growth(make: Callable[[], T]) -> tuple[int, T]:
    """By how much the peak of main memory lies above what there was before while something is made; and that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds free would be used first, and not be seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    made = make()
    return resident("VmHWM") - before, made


def merged(*arguments: str) -> tuple[int, int, int, int, bool]:
    """A FLUX.1 model into which files are merged as it is read: bytes of the weights that are spread, of the largest
    of them, and by how much main memory grew: spread, then whole. And whether both have the same weights."""
    options, arch = opened_with("flux", list(arguments))
    compute = Compute.build(options.precision, CPU)
    sharded = ShardedModel(CPU, dist.get_world_size(), dist.get_world_size())
    sharded.mesh  # noqa: B018
    load_frozen(
        options.network, options.precision.denoiser_format, arch, [], None, compute, "networks.lora"
    )  # imports and what the allocator keeps
    first, ours = growth(
        lambda: load_frozen(
            options.network, options.precision.denoiser_format, arch, [], None, compute, "networks.lora", sharded
        )
    )
    second, theirs = growth(
        lambda: load_frozen(
            options.network, options.precision.denoiser_format, arch, [], None, compute, "networks.lora"
        )
    )
    layers = layers_in_blocks(theirs.denoiser)
    sizes = [layer.weight.numel() * layer.weight.element_size() for layer in layers.values()]
    found = dict(ours.denoiser.named_modules())
    is_same = [torch.equal(found[path].weight, layer.weight) for path, layer in layers.items()]
    rest = [n for n in theirs.denoiser.state_dict() if n.rpartition(".")[0] not in layers or not n.endswith("weight")]
    own, whole = ours.denoiser.state_dict(), theirs.denoiser.state_dict()
    is_same += [torch.equal(own[name], whole[name]) for name in rest]
    return sum(sizes), max(sizes), first, second, all(is_same) and len(is_same) > 50


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
