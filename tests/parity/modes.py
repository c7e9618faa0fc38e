"""Gradients of a complete denoiser in a memory mode: weight format, place, block runner and adapter kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapreplace
from importlib import import_module
from itertools import combinations, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from library.memory.activations import RecomputeFromMainMemory
from library.memory.blocks import BlockRunner, Every, Stacks, plain, recompute
from library.memory.codecs.codec import Codec
from library.memory.codecs.plain import Plain
from library.memory.frozen import FrozenLayer, freeze_layers, frozen_layers, layers_in_blocks, multiply_codes
from library.memory.offload.ring import Ring
from library.memory.offload.sharded import ShardedModel
from library.memory.offload.streamed import stream
from networks.core.protocol import adopt
from tests.parity.deep import DEEP
from tests.unit.networks.toy import randomize
from tests.weight_formats import CODECS

ALL_CODECS: Mapping[str, Codec | None] = {"none": None, "plain": Plain(), **CODECS}
RUNNERS: Mapping[str, Callable[[], BlockRunner]] = {
    "plain": lambda: plain,
    "recompute": lambda: recompute,
    "recompute_every_2": lambda: Every(2, recompute),
    "recompute_from_main_memory": RecomputeFromMainMemory,
}
ADAPTERS: Mapping[str, tuple[str, dict[str, str]]] = {
    "lora": ("networks.lora", {}),
    "dora": ("networks.lora", {"dora_wd": "True"}),
    "dora_per_output": ("networks.lora", {"dora_wd": "True", "wd_on_output": "True"}),
    "loha": ("networks.loha", {}),
    "lokr": ("networks.lokr", {"factor": "2"}),
    "oft_v2": ("networks.oft_v2", {}),
    "boft": ("networks.boft", {"boft_n_butterfly_factor": "2"}),
    "lora_fa": ("networks.lora_fa", {}),
    "dylora": ("networks.dylora", {}),
    "lycoris": ("lycoris.kohya", {"preset": "attn-mlp", "algo": "lokr", "factor": "2"}),
}
PLACES = ("device", "streamed")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mode:
    base: str
    form: str = "none"
    place: str = "device"
    runner: str = "plain"
    adapter: str = "lora"

    def __str__(self) -> str:
        return "-".join((self.base, self.form, self.place, self.runner, self.adapter))


AXES = (tuple(DEEP), tuple(ALL_CODECS), PLACES, tuple(RUNNERS), tuple(ADAPTERS))


def triples_of_modes() -> list[Mode]:
    """Return a fifth of all modes, covering every three values of different axes.

    These are the modes whose axis positions sum to a multiple of 5. Any three values can be completed by the other two
    axes to such a sum: even places and runners, with lengths 2 and 4, add 0 to 4.
    """
    positions = product(*(range(len(axis)) for axis in AXES))
    return [Mode(*(axis[i] for axis, i in zip(AXES, place, strict=True))) for place in positions if sum(place) % 5 == 0]


def pairs_of_modes() -> list[Mode]:
    """Return few modes that cover every two values of different axes, greedily by the number of new pairs."""
    uncovered = {pair for a, b in combinations(range(len(AXES)), 2) for pair in product(keys(a), keys(b))}
    rows = [tuple((i, v) for i, v in enumerate(values)) for values in product(*AXES)]
    # A row never covers more than before, so only the row of the largest earlier count is counted again.
    counts, chosen = [(-len(list(combinations(AXES, 2))), number) for number in range(len(rows))], []
    while uncovered:
        pairs = uncovered.intersection(combinations(rows[counts[0][1]], 2))
        if -len(pairs) == counts[0][0]:
            uncovered -= pairs
            chosen.append(Mode(*(value for _, value in rows[counts[0][1]])))
        heapreplace(counts, (-len(pairs), counts[0][1]))
    return chosen


def keys(axis: int) -> list[tuple[int, str]]:
    return [(axis, value) for value in AXES[axis]]


def gradients(
    mode: Mode,
    change: Callable[[Ring], None] | None = None,
    is_decoded: bool = False,
    is_multiplied: bool = False,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Return the loss and the gradients of all adapter parameters in the second of two equal steps.

    `change` may break the ring. With `is_multiplied`, quantised codes are multiplied directly. With `is_decoded`, the
    layers are replaced by torch layers with the dequantised weights.
    """
    deep = DEEP[mode.base]
    model = deep.frozen(51)
    form = ALL_CODECS[mode.form]
    if form is not None:
        freeze_layers(form, layers_in_blocks(model).values())
    if is_multiplied:
        assert multiply_codes(frozen_layers(model)) > 4
    if is_decoded:
        decode(model)
    elif mode.place == "streamed":
        stacks = deep.stacks(model)
        freeze_layers(Plain(), (layer for stack in stacks for block in stack for layer in block.modules()))
        ring = stream(stacks, [len(stack) - 2 for stack in stacks], device)
        assert ring is not None
        if change is not None:
            change(ring)
    elif mode.place == "spread":
        shard_over_all(model, deep.stacks(model), device)
    model.to(device)
    deep.run_blocks_with(model, RUNNERS[mode.runner]())
    network = install_adapter(mode.adapter, deep.seen(model)).to(device)
    results: list[Tensor] = []
    for _ in range(2):
        for parameter in network.parameters():
            parameter.grad = None
        loss = deep.loss(model, device)
        loss.backward()
        results = [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]
    return results


def shard_over_all(model: nn.Module, stacks: Stacks, device: torch.device = CPU) -> ShardedModel:
    """Shard a model over all processes of torch's group."""
    sharded = ShardedModel(device, dist.get_world_size(), dist.get_world_size())
    freeze_layers(Plain(), layers_in_blocks(model).values())
    for layer in frozen_layers(model):
        sharded.keep_shard(layer)
    sharded.resolve(stacks)
    return sharded


def install_adapter(name: str, seen: nn.Module) -> nn.Module:
    """Install a network with random weights on a denoiser's adapter view and return it."""
    network_module, arguments = ADAPTERS[name]
    torch.manual_seed(52)
    module: Any = import_module(network_module)
    network = module.create_network(1.0, 3, 2, None, [], seen, **arguments)
    if name != "lycoris":
        randomize(network, 53)
    adopt(network).apply_to([], seen, False, True)
    assert isinstance(network, nn.Module)
    if name == "lycoris":
        fill_zeros(network)
    return network.eval()


def fill_zeros(network: nn.Module) -> None:
    """Replace the zeros that make every change start as none with random values."""
    generator = torch.Generator().manual_seed(54)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def decode(model: nn.Module) -> None:
    """Replace frozen layers by torch layers with the dequantised weights."""
    for layer in list(model.modules()):
        if isinstance(layer, FrozenLayer):
            weight = layer.weight
            for name in layer.own_parts():
                delattr(layer, name)
            layer.__class__ = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
            if weight.ndim == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
