"""The ring on complete models, with injected faults that must be detected and with truly concurrent copies."""

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.memory.codecs.plain import Plain
from library.memory.frozen import freeze_layers, layers_in_blocks
from library.memory.offload import streamed
from library.memory.offload.ring import Ring
from library.memory.offload.streamed import stream
from tests.parity.deep import DEEP
from tests.parity.modes import Mode, gradients

CPU = torch.device("cpu")
NIGHTLY = pytest.param("recompute", marks=pytest.mark.nightly)


def skips_the_wait(ring: Ring) -> None:
    ring.streams.ready = lambda slot: None  # type: ignore[method-assign]


def waits_for_the_other_slot(ring: Ring) -> None:
    ready = ring.streams.ready
    ring.streams.ready = lambda slot: ready(1 - slot)  # type: ignore[method-assign]


def gives_the_other_slot(ring: Ring) -> None:
    need = ring.need
    ring.need = lambda block: (need(block), ring.streams.slots[1 - ring.held.index(block)])[1]  # type: ignore[method-assign]


def fills_the_slot_that_computes(ring: Ring) -> None:
    start = ring.streams.start
    ring.streams.start = lambda slot, master: start(slot if ring.now is None else 1 - slot, master)  # type: ignore[method-assign]


def copies_the_neighbour(ring: Ring) -> None:
    ring.masters = [*ring.masters[1:], ring.masters[0]]


def keeps_a_block_too_long(ring: Ring) -> None:
    """Simulate a handle that caches its first result."""
    first: dict[int, Tensor] = {}
    need = ring.need

    def remembered(block: int) -> Tensor:
        if block not in first:
            first[block] = need(block)
        return first[block]

    ring.need = remembered  # type: ignore[method-assign]


FAULTS: list[Callable[[Ring], None]] = [
    skips_the_wait,
    waits_for_the_other_slot,
    gives_the_other_slot,
    fills_the_slot_that_computes,
    copies_the_neighbour,
    keeps_a_block_too_long,
]


def differs(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("runner", ["plain", NIGHTLY])
@pytest.mark.parametrize("adapter", ["lora", "dora"])  # DoRA reads layer.weight
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_a_fault_in_the_ring_changes_the_gradients(base: str, adapter: str, runner: str) -> None:
    mode = Mode(base, place="streamed", runner=runner, adapter=adapter)
    expected = gradients(mode)
    for fault in FAULTS:
        try:
            actual = gradients(mode, fault)
        except (AssertionError, RuntimeError, ValueError):
            continue  # detected even earlier, by the shapes of another block
        assert differs(actual, expected), fault.__name__


class ThreadStreams:
    """Slots filled by another thread after a random delay while blocks compute."""

    def __init__(self, num_slots: int, num_bytes: int, seed: int, longest: float = 2e-3) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(num_slots)]
        self.filled = [threading.Event() for _ in self.slots]
        self.random = random.Random(seed)
        self.longest = longest  # longest time of a copy, in seconds
        self.copies: list[threading.Thread] = []

    def start(self, slot: int, master: Tensor) -> None:
        self.slots[slot].fill_(0xFF)
        self.filled[slot] = filled = threading.Event()
        before, delay = self.copies[-1:], self.random.random() * self.longest

        def copy() -> None:
            for thread in before:  # as on a stream, in submission order
                thread.join()
            time.sleep(delay)
            half = len(master) // 2
            self.slots[slot][:half].copy_(master[:half])
            time.sleep(delay / 2)
            self.slots[slot][half : len(master)].copy_(master[half:])
            filled.set()

        self.copies.append(threading.Thread(target=copy))
        self.copies[-1].start()

    def ready(self, slot: int) -> None:
        self.filled[slot].wait()


@pytest.mark.parametrize("seed", [61, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (62, 63))])
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_concurrent_copies_do_not_change_results(base: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode(base, place="streamed", adapter="dora")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], *rest: object) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed)

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert not differs(gradients(mode), alone)


def test_missing_waits_for_concurrent_copies_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode("flux", place="streamed")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], *rest: object) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed=66, longest=0.1)  # longer than a block computes

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert differs(gradients(mode, skips_the_wait), alone)


@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_from_the_second_step_on_every_block_is_prefetched_before_its_use(base: str) -> None:
    deep = DEEP[base]
    model = deep.frozen(64)
    freeze_layers(Plain(), layers_in_blocks(model).values())
    stacks = deep.stacks(model)
    ring = stream(stacks, [len(stack) - 2 for stack in stacks], CPU)
    assert ring is not None
    model.apply(lambda module: [p.requires_grad_() for p in module.parameters() if isinstance(module, nn.LayerNorm)])
    missed = []
    for _ in range(4):
        latents, *rest = deep.values()
        output = model(latents.requires_grad_(), *rest)
        getattr(output, "sample", output).square().mean().backward()
        missed.append(ring.num_missed)
    assert missed[0] >= 1 and missed[1] == missed[2] == missed[3]
