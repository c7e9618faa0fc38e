"""Removing any wait of the copy streams (ring, offloaded inputs, prefetched batches, readback) is detected."""

import gc
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from library.memory import activations
from library.memory.offload import pinning, readback, streamed, streams
from library.memory.offload.ring import Ring
from library.training.loop import ahead
from library.training.reporting.step_times import StepTimes
from tests.parity.modes import Mode, gradients
from tests.simulated_gpu.device import Simulation
from tests.unit.training.test_loop import batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.provokes_faults, pytest.mark.usefixtures("simulated_gpu")]
GPU = torch.device("cuda")
NUM_BLOCKS, NUM_BYTES = 5, 1 << 12
WAIT = re.compile(r"\.(wait_stream|wait_event|record_stream|record|synchronize|result)\(")


def module_without(module: ModuleType, statement: str, replacement: str = "pass") -> ModuleType:
    """Return a copy of a module with another statement."""
    path = Path(str(module.__file__))
    source = path.read_text(encoding="utf-8")
    assert source.count(f" {statement}\n") + source.count(f" {statement}  #") == 1, f"{statement} is not once in {path}"
    mutant = ModuleType(module.__name__)
    mutant.__file__ = str(path)
    exec(compile(source.replace(f" {statement}", f" {replacement}"), str(path), "exec"), vars(mutant))
    return mutant


def kinds(simulated_gpu: Simulation) -> set[str]:
    gc.collect()
    torch.cuda.synchronize()
    return {fault.kind for fault in simulated_gpu.faults()}


def pin_nothing(masters: Any, reserve: int, share: float) -> pinning.Pinned:
    return pinning.Pinned(frozenset(), "it is not wanted")


# The runs also compare results with the correct ones, but mutants are detected by faults.


def run_ring(name: str, streams: ModuleType, pinning: ModuleType, num_slots: int = 2) -> None:
    """Run two passes forward and backward through blocks of bytes, then drop the ring during a copy."""
    masters = [torch.full((NUM_BYTES,), number, dtype=torch.uint8) for number in range(NUM_BLOCKS)]
    if name == "CudaStreams":
        assert pinning.pin(masters).reason is None
    way = getattr(streams, name)(num_slots, NUM_BYTES, GPU)
    ring = Ring(masters, way)
    both_ways = [*range(NUM_BLOCKS), *reversed(range(NUM_BLOCKS))]
    for block in [*both_ways, *both_ways, 0, 1, 2]:
        ring.need(block).float().mean()
    if name == "StagedStreams":
        way.worker.shutdown()
    del ring, way, masters
    gc.collect()
    reused_memory = [torch.zeros(NUM_BYTES, dtype=torch.uint8, device=GPU) for _ in range(num_slots)]
    assert not any(int(tensor.sum()) for tensor in reused_memory)


def run_batches(ahead: ModuleType) -> None:
    host_batches = [replace(batch_of(float(i)), latents_BCHW=torch.full((1, 4, 8, 8), float(i))) for i in range(4)]
    batches = ahead.Ahead(iter(host_batches), len(host_batches), ahead.CudaCopies(GPU, ()), StepTimes(GPU))
    for batch in batches:
        batch.latents_BCHW.mean()
        batches.fetch()


def run_readback(readback: ModuleType) -> None:
    readback.Readback(torch.arange(3.0, device=GPU)).read()


def run_inputs(activations: ModuleType) -> None:
    """Run blocks forward and backward, and another forward pass whose graph is dropped with the runner."""
    run, layers = activations.RecomputeFromMainMemory(), [torch.nn.Linear(64, 64).to(GPU) for _ in range(4)]

    def forward() -> torch.Tensor:
        x = torch.ones(8, 64, device=GPU).requires_grad_() * 2
        for layer in layers:
            x = run(layer, x)
        return x

    forward().square().sum().backward()
    dropped = forward()
    inputs = run.last()
    inputs.fetch()
    del dropped, inputs
    torch.zeros(8, 64, device=GPU).sum()


SLOTS = (2, 3, 5)
RUNS: dict[str, Callable[..., None]] = {
    "pinned": lambda **m: run_ring("CudaStreams", m.get("streams", streams), m.get("pinning", pinning)),
    "staged": lambda **m: run_ring("StagedStreams", m.get("streams", streams), m.get("pinning", pinning)),
    "ahead": lambda **m: run_batches(m.get("ahead", ahead)),
    "inputs": lambda **m: run_inputs(m.get("activations", activations)),
    "readback": lambda **m: run_readback(m.get("readback", readback)),
}
MUTANTS: dict[tuple[str, str], tuple[str, set[str]]] = {
    # (module, statement): the run, and the faults of which at least one must be detected
    ("streams", "self.copies.wait_stream(torch.cuda.current_stream(self.slots[slot].device))"): ("pinned", {"race"}),
    ("streams", "slot.record_stream(self.copies)"): ("staged", {"freed in use"}),
    ("streams", "self.filled[slot].record(self.copies)"): ("pinned", {"race"}),
    ("streams", "torch.cuda.current_stream(self.slots[slot].device).wait_event(self.filled[slot])"): (
        "pinned",
        {"race"},
    ),
    ("streams", "free.record(torch.cuda.current_stream(self.slots[slot].device))"): ("staged", {"race"}),
    ("streams", "self.read_events[i].synchronize()"): ("staged", {"race", "changed in flight"}),
    ("streams", "self.copies.wait_event(free)"): ("staged", {"race"}),
    ("streams", "self.read_events[i].record(self.copies)"): ("staged", {"race", "changed in flight"}),
    ("streams", "self.pending[slot].result()"): ("staged", {"unordered event", "race"}),
    ("streams", "super().ready(slot)"): ("staged", {"race"}),
    ("pinning", "torch.cuda.synchronize()"): ("pinned", {"unpinned in use"}),
    ("pinning", "weakref.finalize(master, unpin, master.data_ptr()).atexit = False"): (
        "pinned",
        {"freed while registered"},
    ),
    ("activations", "stream.wait_stream(torch.cuda.current_stream(device))"): ("inputs", {"race"}),
    ("activations", "self.copied.record(stream)"): ("inputs", {"unordered event", "race"}),
    ("activations", "torch.cuda.current_stream(self.tensor.device).wait_event(self.copied)"): ("inputs", {"race"}),
    ("activations", "tensor.record_stream(stream)"): ("inputs", {"freed in use"}),
    ("ahead", "self._done.record(self._stream)"): ("ahead", {"race"}),
    ("ahead", "compute_stream.wait_event(self._done)"): ("ahead", {"race"}),
    ("ahead", "tensor.record_stream(compute_stream)"): ("ahead", {"freed in use"}),
    ("readback", "self._arrived.record(torch.cuda.current_stream(values.device))"): ("readback", {"race"}),
    ("readback", "self._arrived.synchronize()"): ("readback", {"race"}),
}
MODULES = {"activations": activations, "streams": streams, "pinning": pinning, "ahead": ahead, "readback": readback}


@pytest.mark.parametrize("num_slots", SLOTS)
@pytest.mark.parametrize("name", ["CudaStreams", "StagedStreams"])
def test_rings_of_every_size_have_no_fault(simulated_gpu: Simulation, name: str, num_slots: int) -> None:
    run_ring(name, streams, pinning, num_slots)
    assert kinds(simulated_gpu) == set()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_slots", SLOTS)
def test_a_second_staging_thread_is_detected(simulated_gpu: Simulation, num_slots: int, num_threads: int) -> None:
    """All slots are requested before the first block is staged, so that every thread there is takes part."""
    statement = 'self.worker = ThreadPoolExecutor({}, "weights")'
    module = module_without(streams, statement.format(1), statement.format(num_threads))
    way, gate = module.StagedStreams(num_slots, NUM_BYTES, GPU, piece=NUM_BYTES // 4), threading.Event()
    stage = way.stage
    way.stage = lambda *block: (gate.wait(), stage(*block))
    masters = [torch.full((NUM_BYTES,), slot, dtype=torch.uint8) for slot in range(num_slots)]
    for slot, master in enumerate(masters):
        way.start(slot, master)
    gate.set()
    for slot in range(num_slots):
        way.ready(slot)
        way.slots[slot].float().mean()
    way.worker.shutdown()
    assert (kinds(simulated_gpu) == set()) == (num_threads == 1)


@pytest.mark.parametrize("name", RUNS)
def test_no_fault_is_reported_with_all_waits(simulated_gpu: Simulation, name: str) -> None:
    RUNS[name]()
    assert kinds(simulated_gpu) == set()


@pytest.mark.parametrize(("module", "statement"), MUTANTS, ids=lambda value: value)
def test_a_missing_wait_is_detected(simulated_gpu: Simulation, module: str, statement: str) -> None:
    name, expected = MUTANTS[module, statement]
    RUNS[name](**{module: module_without(MODULES[module], statement)})
    assert kinds(simulated_gpu) & expected


def test_waiting_for_a_step_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    event_options: list[dict[str, Any]] = []
    event = torch.cuda.Event
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event_options.append(options) or event(**options))
    assert readback.Readback(torch.arange(3.0, device=GPU)).read() == [0, 1, 2]
    assert event_options == [{"blocking": True}]


def test_every_wait_has_a_mutant() -> None:
    lines = {
        (name, line.strip().partition("  #")[0])
        for name, module in MODULES.items()
        for line in Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()
        if WAIT.search(line)
    }
    others = {("streams", "super().ready(slot)"), *(mutant for mutant in MUTANTS if "finalize" in mutant[1])}
    assert lines | others == MUTANTS.keys()


@pytest.mark.parametrize("kept", ["pinned", "staged"])
def test_a_complete_denoiser_on_the_ring_needs_the_ready_wait(
    simulated_gpu: Simulation, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward pass, also from autograd's thread, have no fault, and a race without the wait of `ready`."""
    if kept == "staged":
        monkeypatch.setattr(streamed, "pin", pin_nothing)
    mode = Mode("flux", place="streamed", adapter="lora")
    plain = gradients(Mode("flux", adapter="lora"), device=GPU)
    actual = gradients(mode, device=GPU)
    assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=True))
    assert kinds(simulated_gpu) == set()

    def forget(ring: Ring[Any, Any]) -> None:
        monkeypatch.setattr(ring.streams, "ready", lambda slot: None)

    gradients(mode, forget, device=GPU)
    assert "race" in kinds(simulated_gpu)
    assert any("library/memory/frozen.py" in fault.text for fault in simulated_gpu.faults())
