"""Weights in main memory, exchanged weights, and the running of blocks; parity/test_modes.py tests whole models."""

import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.memory import exchange as module
from library.memory.blocks import BlockRunner, plain, recompute, run_blocks_with, run_encoder_layers_with
from library.memory.codecs.plain import Plain
from library.memory.exchange import exchange, exchange_weights
from library.memory.formats.int8 import Int8Rows
from library.memory.frozen import freeze_layer, freeze_layers, layers_in_blocks
from library.memory.offload import pinning, shared
from library.memory.offload.ring import Ring
from library.memory.offload.shared import share_masters
from library.memory.offload.streamed import allocate_own_master, choose_blocks, stream
from library.memory.offload.streams import CudaStreams, HostStreams, StagedStreams
from library.models.unet.unet import run_unet_blocks_with
from library.training.models.frozen_base import count_offloaded_blocks
from tests.hiding import lazily
from tests.parity.deep import DEEP
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET
from tests.tolerances import FLOAT32_SAME_MATH

diffusers = lazily("diffusers")
transformers = lazily("transformers")

CPU = torch.device("cpu")


def test_only_weights_are_offloaded_and_all_of_their_memory_is_released() -> None:
    deep = DEEP["flux"]
    model = deep.frozen(65)
    before = {name: p for name, p in model.named_parameters()}
    freeze_layers(Plain(), layers_in_blocks(model).values())
    ring = stream(deep.stacks(model), [2, 3], CPU)
    assert ring is not None and len(ring.masters) == 5
    remaining = {name for name, _ in model.named_parameters()}
    waiting = [0, 1], [0, 1, 3]
    assert [choose_blocks(4, 2), choose_blocks(6, 3)] == list(waiting)
    for kind, numbers in zip(("double_blocks", "single_blocks"), waiting, strict=True):
        for i in range(4 if kind == "double_blocks" else 6):
            names = [name for name in before if name.startswith(f"{kind}.{i}.") and before[name].ndim == 2]
            stored = [name for name in remaining if name.startswith(f"{kind}.{i}.") and name.endswith(".values")]
            assert len(stored) == (0 if i in numbers else len(names))
    outside = {name for name in before if before[name].ndim == 1}
    assert outside <= remaining  # norms and biases
    num_bytes = sum(4 * before[name].numel() for name in before if before[name].ndim == 2 and "_blocks" in name)
    assert 0 < sum(map(len, ring.masters)) < num_bytes


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_slots_hold_the_requested_block_and_the_ones_that_follow(num_slots: int) -> None:
    masters = [torch.full((8,), number, dtype=torch.uint8) for number in range(6)]
    ring = Ring(masters, HostStreams(num_slots, 8, CPU))
    forward = list(range(6))
    backward = forward[::-1]
    for step in range(3):
        before = ring.num_missed
        for block, following in pairwise([*forward, *backward, 0]):
            assert ring.need(block).eq(block).all()
            if step and num_slots > 1 and following != block:
                assert following in ring.held
        if step:
            assert ring.num_missed - before == (10 if num_slots == 1 else 0)


def test_a_block_that_was_not_expected_takes_no_slot_of_the_one_that_computes() -> None:
    """Its copy would wait for the computation."""
    masters = [torch.full((8,), number, dtype=torch.uint8) for number in range(6)]
    ring, other = (Ring(masters, HostStreams(2, 8, CPU)) for _ in range(2))
    computing = ring.need(0)
    assert ring.need(3) is not computing
    other.need(3), other.need(0)
    assert ring.digest != other.digest, "the order counts"


def test_a_ring_of_another_size_changes_no_gradient() -> None:
    deep = DEEP["flux"]
    gradients = []
    for num_slots in (1, 2, 3):
        model = deep.frozen(65)
        freeze_layers(Plain(), layers_in_blocks(model).values())
        ring = stream(deep.stacks(model), [2, 3], CPU, num_slots=num_slots)
        assert ring is not None and len(ring.streams.slots) == num_slots
        latents, *rest = deep.values()
        latents.requires_grad_()
        model(latents, *rest).square().mean().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().sum() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize(("num_blocks", "count"), [(6, 1), (6, 3), (6, 4), (19, 17), (38, 36), (57, 20), (3, 1)])
def test_offloaded_blocks_are_spread_evenly_and_the_last_stays(num_blocks: int, count: int) -> None:
    numbers = choose_blocks(num_blocks, count)
    assert len(set(numbers)) == count and max(numbers) < num_blocks - 1
    gaps = [b - a for a, b in pairwise(numbers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


BLOCKS_19_38 = [[nn.Identity()] * 19, [nn.Identity()] * 38]
BLOCKS_8_48 = [[nn.Identity()] * 8, [nn.Identity()] * 48]
BLOCKS_20_8 = [[nn.Identity()] * 20, [nn.Identity()] * 8]
BLOCKS_30 = [[nn.Identity()] * 30]


@pytest.mark.parametrize(
    ("num_blocks", "stacks", "expected"),
    [(35, BLOCKS_19_38, [17, 36]), (18, BLOCKS_19_38, [9, 18]), (7, BLOCKS_19_38, [3, 8]), (28, BLOCKS_30, [28])],
)
def test_blocks_are_counted_as_sd_scripts_counts_them(num_blocks: int, stacks: Any, expected: list[int]) -> None:
    assert count_offloaded_blocks(num_blocks, stacks) == expected


@pytest.mark.parametrize(
    ("num_blocks", "stacks", "expected"),
    [
        (12, BLOCKS_8_48, [6, 12]),
        (13, BLOCKS_8_48, [6, 14]),
        (29, BLOCKS_8_48, [6, 46]),
        (6, BLOCKS_20_8, [3, 6]),
        (7, BLOCKS_20_8, [4, 6]),
        (21, BLOCKS_20_8, [18, 6]),
    ],
)
def test_if_one_stack_has_too_few_blocks_the_other_offloads_more(
    num_blocks: int, stacks: Any, expected: list[int]
) -> None:
    assert count_offloaded_blocks(num_blocks, stacks) == expected


@pytest.mark.parametrize(
    ("num_blocks", "stacks", "most"),
    [(36, BLOCKS_19_38, 35), (30, BLOCKS_8_48, 29), (22, BLOCKS_20_8, 21), (29, BLOCKS_30, 28)],
)
def test_too_many_blocks_to_swap_is_an_error_that_names_the_maximum(num_blocks: int, stacks: Any, most: int) -> None:
    with pytest.raises(UserError, match=f"--blocks_to_swap {num_blocks}: .* at most {most} can be swapped$"):
        count_offloaded_blocks(num_blocks, stacks)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not copy pinned pages at a fork")
def test_forked_workers_do_not_inherit_the_pinned_masters() -> None:
    """Pinned pages would be copied for each worker."""
    master, is_filled = allocate_own_master(0, 3 * 4096 + 5)
    assert len(master) == 3 * 4096 + 5 and not is_filled and master.is_contiguous()
    master.fill_(7)
    ordinary = torch.full((1 << 22,), 7, dtype=torch.uint8)  # ordinary memory
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.write(write_end, bytes([is_mapped(master.data_ptr()), is_mapped(ordinary.data_ptr())]))
        os._exit(0)
    assert list(os.read(read_end, 2)) == [False, True]
    assert is_mapped(master.data_ptr()) and int(master.sum()) == 7 * len(master)


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_without_offloaded_blocks_there_is_no_ring() -> None:
    assert stream([[nn.Linear(3, 3), nn.Linear(3, 3)]], [0], CPU) is None


class Runtime:
    """A stand-in for the CUDA runtime that pins a limited number of buffers."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.pinned) == self.most or address in self.pinned:
            return 2
        self.pinned.append(address)
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return {2: "out of memory"}[status]

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


def buffers(count: int) -> list[torch.Tensor]:
    return [torch.zeros(100, dtype=torch.uint8) for _ in range(count)]


@pytest.fixture
def limited_runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime(most=5)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinning, "clear_last_error", lambda: None)
    return runtime


def test_blocks_are_pinned_until_the_runtime_refuses(limited_runtime: Runtime) -> None:
    """Pinned blocks are spread evenly, so that unpinned blocks are not consecutive."""
    masters = buffers(8)
    result = pinning.pin(masters)
    assert result.reason == "cudaHostRegister failed: out of memory"
    assert result.addresses == {masters[i].data_ptr() for i in (0, 4, 2, 6, 1)} == set(limited_runtime.pinned)
    del masters
    assert limited_runtime.pinned == []


@pytest.mark.parametrize(("reserve", "num_pinned"), [(0, 5), (1, 4), (200, 3), (201, 2), (9999, 0)])
def test_room_for_the_staging_buffers_is_left(reserve: int, num_pinned: int, limited_runtime: Runtime) -> None:
    masters = buffers(8)
    assert len(pinning.pin(masters, reserve).addresses) == len(limited_runtime.pinned) == num_pinned


def test_most_of_main_memory_is_left_unpinned(limited_runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 1000}))
    masters = buffers(5)
    result = pinning.pin(masters)
    assert len(result.addresses) == 4 and "0.0 GB is more than 40% of main memory" in str(result.reason)


@pytest.mark.parametrize(("total", "num_pinned"), [(10_000, 2), (1000, 2)])
def test_half_of_what_can_be_pinned_is_left_to_inputs(
    total: int, num_pinned: int, limited_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime refuses the sixth buffer of 100 bytes; 40 % of 1000 bytes are four buffers."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": total}))
    masters = buffers(8)
    assert len(pinning.pin(masters, share=0.5).addresses) == len(limited_runtime.pinned) == num_pinned


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13])
def test_every_prefix_of_the_pinning_order_is_evenly_spread(count: int) -> None:
    order = pinning.spread_order(count)
    assert sorted(order) == list(range(count))
    for num in range(1, count + 1):
        first = sorted(order[:num])
        assert max(b - a for a, b in pairwise([*first, count])) <= 2 ** ((count - 1) // num).bit_length()


def test_memory_stays_pinned_until_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(most=3)
    waits_for_copies: list[None] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits_for_copies.append(None))
    masters = [torch.zeros(100, dtype=torch.uint8) for _ in range(3)]
    addresses = [master.data_ptr() for master in masters]
    assert pinning.pin(masters).reason is None and sorted(runtime.pinned) == sorted(addresses)
    part = masters[0][10:20]
    del masters
    assert runtime.pinned == [addresses[0]]
    assert len(waits_for_copies) == 2
    del part
    assert runtime.pinned == [] and len(waits_for_copies) == 3


class FakeCuda:
    """A stand-in for torch.cuda that records calls to streams and events; copies run at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        log = self.log

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.is_blocking = blocking

            def record(self, stream: Any) -> None:
                log.append(f"record on {stream.name}")

            def synchronize(self) -> None:
                log.append("host waits")

        class Stream:
            def __init__(self, device: Any = None, name: str = "copies") -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Event) -> None:
                log.append(f"{self.name} waits for an event")

            def __enter__(self) -> None:
                log.append(f"on {self.name}")

            def __exit__(self, *_: Any) -> None: ...

        compute = Stream(name="compute")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kw: empty(*size, **kw))


FILL = ["on copies", "record on copies"]


def test_copies_wait_for_compute_and_compute_waits_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = CudaStreams(2, 8, CPU)
    streams.start(1, torch.arange(6, dtype=torch.uint8))
    streams.ready(1)
    assert cuda.log == [*["kept for copies"] * 2, "copies waits for compute", *FILL, "compute waits for an event"]
    assert streams.slots[1][:6].tolist() == [0, 1, 2, 3, 4, 5]


def test_unpinned_memory_is_copied_through_pinned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = StagedStreams(2, 8, CPU)
    streams.start(0, torch.full((4,), 7, dtype=torch.uint8))
    streams.ready(0)
    staged = ["copies waits for an event", "host waits", *FILL, "record on copies"]
    assert cuda.log == [*["kept for copies"] * 2, "record on compute", *staged, "compute waits for an event"]
    streams.start(1, torch.full((5,), 8, dtype=torch.uint8))
    streams.ready(1)
    assert [slot[0].item() for slot in streams.slots] == [7, 8]
    assert streams.staging[0] is not streams.staging[1] and streams.next_buffer == 0
    assert all(vars(event)["is_blocking"] for event in streams.read_events), "the thread does not spin"


def test_a_block_larger_than_a_buffer_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    streams = StagedStreams(2, 8, CPU, piece=3)
    assert [len(buffer) for buffer in streams.staging] == [3, 3]
    streams.start(0, torch.arange(8, dtype=torch.uint8))
    streams.ready(0)
    assert streams.slots[0].tolist() == [*range(8)] and cuda.log.count("host waits") == 3


def test_pinned_blocks_are_copied_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    master = torch.arange(8, dtype=torch.uint8)
    streams = StagedStreams(2, 8, CPU, {master.data_ptr()})
    streams.start(1, master)
    streams.ready(1)
    assert streams.slots[1].tolist() == [*range(8)] and "host waits" not in cuda.log


def test_a_slot_on_the_cpu_is_nan_until_its_copy_is_awaited() -> None:
    streams = HostStreams(2, 8, CPU)
    streams.start(0, torch.zeros(8, dtype=torch.uint8))
    assert streams.slots[0].view(torch.float32).isnan().all() and streams.slots[0].view(torch.bfloat16).isnan().all()
    streams.ready(0)
    assert not streams.slots[0].any()


def test_processes_of_one_machine_share_one_master(tmp_path: Path) -> None:
    """The second process uses the bytes of the first and writes none."""
    deep = DEEP["lumina"]
    rings = []
    for is_first in (True, False):
        model = deep.frozen(67 if is_first else 68)  # the second process must not use its own weights
        stacks = deep.stacks(model)
        freeze_layers(Plain(), (layer for block in stacks[0] for layer in block.modules()))
        rings.append(stream(stacks, [3], CPU, share_masters(tmp_path, is_first)))
    first, second = rings
    assert first is not None and second is not None
    assert all(torch.equal(a, b) for a, b in zip(first.masters, second.masters, strict=True))
    first.masters[1][:4] = 99
    assert second.masters[1][:4].tolist() == [99] * 4
    for ring in rings:
        assert ring is not None and torch.equal(ring.need(2)[: len(first.masters[2])], first.masters[2])


def test_shared_masters_use_dev_shm_if_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared, "IN_MEMORY", tmp_path)
    monkeypatch.setattr(shared.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert shared.place_for(800) == str(tmp_path) and shared.place_for(950) is None
    monkeypatch.setattr(shared, "IN_MEMORY", tmp_path / "nowhere")
    assert shared.place_for(1) is None


# Running blocks: every denoiser runs all of its blocks through its runner.


def tiny_unet() -> Any:
    unet = diffusers.UNet2DConditionModel(**UNET).eval()
    unet.load_state_dict(fixed_init(unet, 31))
    return unet.requires_grad_(False)


def gradient(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(32)
    x = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    text = torch.randn(2, 7, UNET["cross_attention_dim"], generator=generator)
    unet(x, torch.tensor([17, 801]), text).sample.square().mean().backward()
    assert x.grad is not None
    return x.grad


def test_layers_of_a_text_encoder_are_recomputed_with_the_base_models_dropout_off() -> None:
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**CLIP, "attention_dropout": 0.5})).eval()
    clip.load_state_dict(fixed_init(clip, 34))
    ids = torch.tensor([[0, 5, 7, 1]])

    def gradients() -> list[Tensor]:
        loss = clip(ids).last_hidden_state.square().sum()
        return list(torch.autograd.grad(loss, [p for p in clip.parameters() if p.requires_grad], allow_unused=True))

    alone = gradients()
    recorder = Recorder(recompute)
    run_encoder_layers_with(clip, recorder)
    recomputed = gradients()
    assert len(recorder.ran) == CLIP["num_hidden_layers"]
    for expected, actual in zip(alone, recomputed, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(expected, actual, **FLOAT32_SAME_MATH)


class Recorder:
    """A runner that records the blocks it ran and delegates to another runner."""

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self.ran: list[nn.Module] = []

    def __call__(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        self.ran.append(block)
        return self.runner(block, *inputs, **named)


def test_recomputing_keeps_the_inputs_of_a_block_and_changes_no_gradient() -> None:
    torch.manual_seed(33)
    block = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5))
    x = torch.randn(3, 5)
    results, saved_inputs = [], []
    for runner in (plain, recompute):
        saved: list[Tensor] = []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            y = runner(block, leaf)
        results.append(torch.autograd.grad(y.square().sum(), leaf)[0])
        saved_inputs.append(max((t.shape[-1] for t in saved), default=0))
    assert torch.equal(*results)
    assert saved_inputs == [40, 5]  # only the inputs if blocks are recomputed


def test_nothing_is_recomputed_without_gradients() -> None:
    grad_enabled: list[bool] = []

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grad_enabled.append(torch.is_grad_enabled())
            return x

    with torch.no_grad():
        recompute(Block(), torch.ones(1))
    assert grad_enabled == [False]


def test_all_residual_and_transformer_blocks_of_a_unet_run_through_the_runner() -> None:
    unet = tiny_unet()
    alone = gradient(unet)
    names = dict(unet.named_modules()).keys()
    recorder = Recorder(plain)
    run_unet_blocks_with(unet, recorder)
    assert torch.equal(gradient(unet), alone)
    kinds = [type(body.block).__name__ for body in recorder.ran]
    expected = [type(module).__name__ for module in unet.modules()]
    for kind in ("ResnetBlock2D", "BasicTransformerBlock"):
        assert kinds.count(kind) == expected.count(kind) > 0
    assert len(set(kinds)) == 2 and len(set(recorder.ran)) == len(recorder.ran)
    assert dict(unet.named_modules()).keys() == names
    assert all(any(p is q for q in unet.parameters()) for p in recorder.ran[0].parameters())


def test_a_later_runner_replaces_the_first() -> None:
    unet = tiny_unet()
    alone = gradient(unet)
    first, second = Recorder(plain), Recorder(recompute)
    run_unet_blocks_with(unet, first)
    run_unet_blocks_with(unet, second)
    assert torch.equal(gradient(unet), alone)
    assert not first.ran and second.ran


def flux() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.flux import inputs, tiny_flux

    return tiny_flux(3), list(inputs(8, 6))


def lumina() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.lumina import inputs, tiny_lumina

    return tiny_lumina(3), list(inputs(8, 6))


def anima() -> tuple[nn.Module, list[Tensor]]:
    from tests.tiny.anima import inputs, tiny_anima

    return tiny_anima(4), list(inputs(8, 6))


@pytest.mark.parametrize("build", [flux, lumina, anima], ids=lambda build: build.__name__)
def test_our_denoisers_run_every_block_in_order(build: Callable[[], tuple[nn.Module, list[Tensor]]]) -> None:
    model, values = build()
    recorder = Recorder(plain)
    alone = model(*values)
    run_blocks_with(model, recorder)
    assert torch.equal(model(*values), alone)
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for block_list in lists for block in block_list if any(block is ran for ran in recorder.ran)]
    assert sorted(map(id, blocks)) == sorted(map(id, recorder.ran)) and len(blocks) >= 2
    transformer = max(lists, key=len)
    assert [block for block in recorder.ran if any(block is layer for layer in transformer)] == list(transformer)


# Two models exchange their weights in place, and are restored if that is interrupted.


def model(seed: int, stores: bool = False) -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).requires_grad_(False)
    layers.load_state_dict(fixed_init(layers, seed))
    if stores:
        freeze_layer(Int8Rows(), layers[0])
    return layers


X = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.mark.parametrize("stores", [False, True], ids=["numbers", "int8"])
def test_models_compute_each_others_outputs_during_an_exchange(stores: bool) -> None:
    first, second = model(1, stores), model(2, stores)
    expected, before = second(X), first(X)
    places = [parameter.data_ptr() for parameter in first.parameters()]
    with exchange_weights(first, second):
        assert torch.equal(first(X), expected) and torch.equal(second(X), before)
        assert [parameter.data_ptr() for parameter in first.parameters()] == places
    assert torch.equal(first(X), before) and torch.equal(second(X), expected) and not torch.equal(before, expected)


def test_an_error_during_an_exchange_restores_the_weights() -> None:
    first, second = model(1), model(2)
    before = first(X)
    with pytest.raises(RuntimeError, match="drawing"), exchange_weights(first, second):
        raise RuntimeError("drawing")
    assert torch.equal(first(X), before)


def test_a_failed_copy_leaves_both_models_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model_a, model_b = model(1), model(2)
    before, other_before = model_a(X), model_b(X)
    swap, calls = module.swap, []

    def failing(first: torch.Tensor, second: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        swap(first, second)

    monkeypatch.setattr(module, "swap", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange(model_a, model_b)
    assert torch.equal(model_a(X), before) and torch.equal(model_b(X), other_before) and len(calls) == 7


def test_models_in_different_storage_formats_are_refused() -> None:
    first, second = model(1), model(2, stores=True)
    before = first(X)
    with pytest.raises(UserError, match="stored differently"):
        exchange(first, second)
    assert torch.equal(first(X), before)
