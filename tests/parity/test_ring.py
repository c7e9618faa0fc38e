"""The ring on whole models: with faults put in, which must show, and with copies that really run beside."""

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.memory.codecs.plain import Plain
from library.memory.frozen import layers_in_blocks, store_all_in
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
    """As a handle would that asks once and remembers."""
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


def differs(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("runner", ["plain", NIGHTLY])
@pytest.mark.parametrize("adapter", ["lora", "dora"])  # dora reads layer.weight
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_a_fault_in_the_ring_shows_in_the_gradients(base: str, adapter: str, runner: str) -> None:
    mode = Mode(base, place="streamed", runner=runner, adapter=adapter)
    whole = gradients(mode)
    for fault in FAULTS:
        try:
            found = gradients(mode, fault)
        except (AssertionError, RuntimeError, ValueError):
            continue  # it is noticed even before: shapes of another block
        assert differs(found, whole), fault.__name__


class ThreadStreams:
    """Slots that another thread fills, after a delay of its own, while the blocks compute."""

    def __init__(self, num_slots: int, num_bytes: int, seed: int, longest: float = 2e-3) -> None:
        self.slots = [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(num_slots)]
        self.filled = [threading.Event() for _ in self.slots]
        self.random = random.Random(seed)
        self.longest = longest  # seconds that a copy takes
        self.copies: list[threading.Thread] = []

    def start(self, slot: int, master: Tensor) -> None:
        self.slots[slot].fill_(0xFF)
        self.filled[slot] = filled = threading.Event()
        before, delay = self.copies[-1:], self.random.random() * self.longest

        def copy() -> None:
            for thread in before:  # one stream: in the order in which they were given
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


@pytest.mark.parametrize("seed", [61, 62, 63])
@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_copies_that_run_beside_change_nothing(base: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode(base, place="streamed", adapter="dora")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], device: torch.device) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed)

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert not differs(gradients(mode), alone)


def test_copies_that_run_beside_and_are_not_waited_for_show(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Mode("flux", place="streamed")
    alone = gradients(mode)

    def open_streams(masters: list[Tensor], device: torch.device) -> ThreadStreams:
        return ThreadStreams(2, max(map(len, masters)), seed=66, longest=0.1)  # a block computes in less

    monkeypatch.setattr(streamed, "open_streams", open_streams)
    assert differs(gradients(mode, skips_the_wait), alone)


@pytest.mark.parametrize("base", ["sd", "flux", "lumina"])
def test_from_the_second_step_on_every_block_is_there_before_it_is_asked_for(base: str) -> None:
    deep = DEEP[base]
    model = deep.frozen(64)
    store_all_in(Plain(), layers_in_blocks(model).values())
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
