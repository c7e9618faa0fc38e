"""Functions that all processes of a group call for test_sharded_gradients.py."""

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers  # noqa: F401  # a run has imported it before it reads a model, whose memory is measured here
import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.checkpoints.weights import Weights
from library.memory.codecs.codec import AS_IN_FILE, AsRead
from library.memory.frozen import FrozenLayer, frozen_layers, layers_in_blocks
from library.memory.offload.sharded import ShardedModel
from library.models.loading import materialise
from library.processes.gradient_exchange import Order, exchange_gradients
from library.processes.process_group import Processes
from library.training.models.compute import Compute
from library.training.models.frozen_models import load_frozen
from library.training.models.weight_formats import BaseFormats
from networks.core.protocol import open_network_module
from tests.parity.deep import DEEP
from tests.parity.modes import CPU, Mode, gradients, shard_over_all
from tests.parity.tiny_models import opened_with

WIDTH, NUM_LAYERS = 1024, 12
T = TypeVar("T")


def compared(*modes: str) -> list[tuple[int, float]]:
    """Return, for each mode, the number of gradients and their largest difference from the unsharded model's."""
    results = []
    for text in modes:
        base, form, runner, adapter = text.split("/")
        mode = Mode(base, form, "spread", runner, adapter)
        ours, theirs = gradients(mode), gradients(Mode(base, form, adapter=adapter), is_decoded=True)
        assert len(ours) == len(theirs) and any(bool(value.any()) for value in theirs[1:])
        off = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True)]
        results.append((len(ours), max(off)))
    return results


def kept() -> tuple[int, int, int]:
    """Return the bytes of a model's weights, of this process's shard, and of the weights left in the model."""
    deep = DEEP["flux"]
    model = deep.frozen(71)
    sharded = shard_over_all(model, deep.stacks(model))
    assert sharded.ring is not None
    shares: list[Any] = [p for shelf in sharded.ring.masters for p in shelf.parameters()]
    remaining = sum(p.numel() for layer in frozen_layers(model) for p in layer.own_parts().values())
    return sharded.num_bytes, sum(share.to_local().numel() for share in shares), remaining


def one_alone() -> list[bool]:
    """Let only the first process compute while the others follow, also if it fails; then all. Return the checks."""
    deep = DEEP["flux"]
    model, unsharded = deep.frozen(72), deep.frozen(72)
    sharded = shard_over_all(model, deep.stacks(model))
    is_right = []
    for fails in (False, True, False):
        if dist.get_rank() != 0:
            sharded.follow(0)
            continue
        try:
            with torch.no_grad(), sharded.lead():
                is_right.append(torch.equal(deep.loss(model, CPU), deep.loss(unsharded, CPU)))
                if fails:
                    raise ValueError("drawing failed")
        except ValueError:
            pass
    with torch.no_grad():
        is_right.append(torch.equal(deep.loss(model, CPU), deep.loss(unsharded, CPU)))
    return is_right


def out_of_order() -> list[str]:
    """Return the errors of a step in which processes request different blocks, and of one in which they agree."""
    deep = DEEP["flux"]
    processes = Processes(dist.get_rank(), dist.get_world_size(), store=None)
    errors = []
    for block in (5, 5 + dist.get_rank()):
        sharded = shard_over_all(model := deep.frozen(73), deep.stacks(model))
        assert sharded.ring is not None
        sharded.ring.need(block)
        try:
            exchange_gradients(processes, [], torch.zeros(0), 0, [], Order(sharded.digest, sharded.group_size))
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def peaks() -> tuple[int, int, int]:
    """Return the bytes of a model and the peak memory growth while reading it: sharded, then unsharded."""
    values = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(74))
    names = [f"layers.{i}.weight" for i in range(NUM_LAYERS)]
    shapes = {name: (WIDTH, WIDTH) for name in names}

    def read(name: str) -> Tensor:
        return values * (1 + names.index(name))

    weights = Weights("made up", shapes, read)
    sharded = ShardedModel(CPU, dist.get_world_size(), dist.get_world_size())
    sharded.mesh  # noqa: B018
    first = reading_growth(weights, AsRead(AS_IN_FILE, shard=sharded.keep_shard))
    layers: list[Any] = list(sharded.shares)
    assert all(isinstance(layer, FrozenLayer) for layer in layers)
    assert torch.equal(layers[3].weight, read(names[3]))
    return NUM_LAYERS * WIDTH**2 * 4, first, reading_growth(weights, None)


def reading_growth(weights: Weights, form: Any) -> int:
    """Return by how much reading the weights raises this process's peak memory."""
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)])
    return growth(lambda: materialise(model, weights, torch.float32, form))[0]


def growth(make: Callable[[], T]) -> tuple[int, T]:
    """Return by how much `make` raises the peak memory, and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise free memory of the allocator would be used first and not be seen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    result = make()
    return resident("VmHWM") - before, result


def merged(*arguments: str) -> tuple[int, int, int, int, bool]:
    """Read a FLUX.1 model while merging files; return the bytes of the sharded weights and of the largest one, the
    memory growth (sharded, then unsharded), and whether both have the same weights."""
    options, arch = opened_with("flux", list(arguments))
    compute = Compute.build(options.precision, CPU)
    sharded = ShardedModel(CPU, dist.get_world_size(), dist.get_world_size())
    sharded.mesh  # noqa: B018
    load = partial(
        load_frozen,
        options.network,
        BaseFormats.load(options.precision).denoiser,
        arch,
        [],
        None,
        compute,
        open_network_module("networks.lora"),
    )
    load()  # imports and memory held by the allocator
    first, ours = growth(partial(load, sharded))
    second, theirs = growth(load)
    layers = layers_in_blocks(theirs.denoiser)
    sizes = [layer.weight.numel() * layer.weight.element_size() for layer in layers.values()]
    modules_by_name = dict(ours.denoiser.named_modules())
    is_same = [torch.equal(modules_by_name[path].weight, layer.weight) for path, layer in layers.items()]
    rest = [n for n in theirs.denoiser.state_dict() if n.rpartition(".")[0] not in layers or not n.endswith("weight")]
    sharded_state, whole_state = ours.denoiser.state_dict(), theirs.denoiser.state_dict()
    is_same += [torch.equal(sharded_state[name], whole_state[name]) for name in rest]
    return sum(sizes), max(sizes), first, second, all(is_same) and len(is_same) > 50


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
