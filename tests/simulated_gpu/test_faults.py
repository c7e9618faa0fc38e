"""Each kind of fault in README.md is provoked and detected, and the correct variant is not reported."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from tests.simulated_gpu.device import Simulation

pytestmark = [pytest.mark.gpu, pytest.mark.provokes_faults, pytest.mark.usefixtures("simulated_gpu")]
GPU = torch.device("cuda")
NUM = 1 << 12


def kinds(simulated_gpu: Simulation) -> set[str]:
    torch.cuda.synchronize()
    return {fault.kind for fault in simulated_gpu.faults()}


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_that_does_not_wait_for_a_copy_is_a_race(simulated_gpu: Simulation, waits: bool) -> None:
    host, slot = torch.ones(NUM).pin_memory(), torch.zeros(NUM, device=GPU)
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slot.copy_(host, non_blocking=True)
        done.record(stream)
    if waits:
        torch.cuda.current_stream().wait_event(done)
    assert float(slot.sum()) == NUM  # a correct value proves nothing
    assert ("race" in kinds(simulated_gpu)) is not waits
    if not waits:
        text = simulated_gpu.faults()[0].text
        assert "read by aten::sum" in text and "write by copy to the device" in text and "test_faults.py" in text


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_that_does_not_wait_for_readers_is_a_race(simulated_gpu: Simulation, waits: bool) -> None:
    host, slot = torch.ones(NUM).pin_memory(), torch.zeros(NUM, device=GPU)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    slot.sum()
    if waits:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        slot.copy_(host, non_blocking=True)
    assert kinds(simulated_gpu) == (set() if waits else {"race"})


@pytest.mark.parametrize("waits", [True, False])
def test_a_host_that_reads_early_gets_nan(simulated_gpu: Simulation, waits: bool) -> None:
    values, here = torch.arange(4.0, device=GPU), torch.empty(4, pin_memory=True)
    here.copy_(values, non_blocking=True)
    if waits:
        torch.cuda.current_stream().synchronize()
    read_values = here.tolist()
    assert read_values == [0, 1, 2, 3] if waits else all(number != number for number in read_values)
    assert kinds(simulated_gpu) == (set() if waits else {"race"})


@pytest.mark.parametrize("waits", [True, False])
def test_a_host_that_overwrites_early_sends_wrong_bytes(simulated_gpu: Simulation, waits: bool) -> None:
    host = torch.ones(4).pin_memory()
    there = host.to(GPU, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    host.fill_(7)
    assert there.tolist() == ([1] * 4 if waits else [7] * 4)
    assert kinds(simulated_gpu) == (set() if waits else {"changed in flight"})


def test_a_host_that_copies_into_pinned_memory_early_is_a_race(simulated_gpu: Simulation) -> None:
    """This also holds if the simulated copy has already finished."""
    staging = torch.zeros(NUM, pin_memory=True)
    there = staging.to(GPU, non_blocking=True)
    there + 1  # needs the bytes, so the simulated copy runs; a real GPU might not have run it yet
    staging.copy_(torch.ones(NUM))
    assert kinds(simulated_gpu) == {"race"}


def test_a_host_that_writes_into_a_copys_destination_is_detected(simulated_gpu: Simulation) -> None:
    here = torch.empty(4, pin_memory=True)
    here.copy_(torch.ones(4, device=GPU), non_blocking=True)
    here.zero_()
    assert kinds(simulated_gpu) == {"changed in flight"}


@pytest.mark.parametrize("records", [True, False])
def test_freeing_memory_while_another_stream_reads_it_is_detected(simulated_gpu: Simulation, records: bool) -> None:
    side, batch = torch.cuda.Stream(), torch.ones(NUM, device=GPU)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        total = batch.sum()
    if records:
        batch.record_stream(side)
    del batch
    torch.zeros(NUM, device=GPU)  # reuses the memory if it is free
    torch.cuda.synchronize()
    assert int(total) == NUM
    assert kinds(simulated_gpu) == (set() if records else {"freed in use", "race"})


@pytest.mark.parametrize("waits", [True, False])
def test_unpinning_memory_during_a_copy_is_detected(simulated_gpu: Simulation, waits: bool) -> None:
    master = torch.ones(NUM)
    runtime = torch.cuda.cudart()
    assert runtime.cudaHostRegister(master.data_ptr(), master.nbytes, 0) == 0 and master.is_pinned()
    there = master.to(GPU, non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    runtime.cudaHostUnregister(master.data_ptr())
    assert kinds(simulated_gpu) == (set() if waits else {"unpinned in use"})
    assert there.tolist() == [1] * NUM and not master.is_pinned()


def test_memory_that_is_freed_while_registered_is_detected(simulated_gpu: Simulation) -> None:
    master = torch.ones(NUM)
    torch.cuda.cudart().cudaHostRegister(master.data_ptr(), master.nbytes, 0)
    del master
    assert kinds(simulated_gpu) == {"freed while registered"}


@pytest.mark.parametrize("waits", [True, False])
def test_emptying_the_cache_does_not_wait_for_copies(simulated_gpu: Simulation, waits: bool) -> None:
    values = torch.full((NUM,), 3.0, device=GPU)
    here = values.to("cpu", non_blocking=True)
    reserved = torch.cuda.memory_reserved()
    del values
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved
    if waits:
        torch.cuda.synchronize()
    assert bool(here.isnan().all()) is not waits
    torch.cuda.synchronize()
    assert bool((here == 3).all())


@pytest.mark.parametrize("waits", [True, False])
def test_waiting_for_an_event_that_may_not_be_recorded_yet_is_detected(simulated_gpu: Simulation, waits: bool) -> None:
    """The event is recorded in time only by chance, because this thread does not wait for the other."""
    event, has_recorded = torch.cuda.Event(), threading.Event()

    def record() -> None:
        event.record(torch.cuda.current_stream())
        has_recorded.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(record)
        has_recorded.wait()
        if waits:
            future.result()
        torch.cuda.current_stream().wait_event(event)
    assert kinds(simulated_gpu) == (set() if waits else {"unordered event"})


@pytest.mark.parametrize("waits", [True, False])
def test_two_threads_launching_on_one_stream_are_detected(simulated_gpu: Simulation, waits: bool) -> None:
    """A stream keeps the launch order, which is undefined without synchronisation between the threads."""
    values, done = torch.zeros(NUM, device=GPU), threading.Event()

    def write() -> None:
        values.fill_(1)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    done.wait()
    if waits:
        thread.join()
    values.sum()
    assert kinds(simulated_gpu) == (set() if waits else {"race"})
    thread.join()


def test_a_failed_pin_leaves_its_error_for_the_next_kernel(simulated_gpu: Simulation) -> None:
    block = torch.empty(3 << 20, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    with simulated_gpu.configured(pin_limit_bytes=2 << 20):
        assert int(runtime.cudaHostRegister(block.data_ptr(), len(block), 0)) == 2
    with pytest.raises(RuntimeError, match="CUDA error: out of memory"):
        torch.ones(1, device=GPU) + 1
    torch.ones(1, device=GPU) + 1  # the error is reported once
    assert int(runtime.cudaHostRegister(block.data_ptr(), 1 << 20, 0)) == 0
    assert int(runtime.cudaHostRegister(block.data_ptr() + (1 << 19), 1 << 20, 0)) == 712
    with pytest.raises(RuntimeError, match="already mapped"):
        torch.ones(1, device=GPU) + 1
    assert int(runtime.cudaHostUnregister(block.data_ptr())) == 0


def test_pinned_memory_is_rounded_to_powers_of_two_up_to_a_limit(simulated_gpu: Simulation) -> None:
    before = simulated_gpu.stats()["pinned"]
    kept = torch.empty((1 << 20) + 1, dtype=torch.uint8, pin_memory=True)
    assert simulated_gpu.stats()["pinned"] - before == 2 << 20 and kept.is_pinned()
    with (
        simulated_gpu.configured(pin_limit_bytes=before + (3 << 20)),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        torch.empty(1 << 20 | 1, dtype=torch.uint8, pin_memory=True)


def test_a_full_gpu_raises_torchs_out_of_memory_error(simulated_gpu: Simulation) -> None:
    torch.cuda.empty_cache()
    simulated_gpu.limit_memory(simulated_gpu.stats()["reserved"] + (64 << 20))
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            kept = [torch.empty(8 << 20, device=GPU) for _ in range(4)]
            assert kept
    finally:
        simulated_gpu.limit_memory(simulated_gpu.settings.memory_bytes)
    assert simulated_gpu.stats()["num_ooms"] >= 1


def test_memory_peaks_are_counted(simulated_gpu: Simulation) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.empty(1 << 20, dtype=torch.uint8, device=GPU)
    assert torch.cuda.max_memory_allocated() - before == 1 << 20
    assert torch.cuda.memory_allocated() == before


MIXED: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: x + torch.ones(3),
    "matmul": lambda x: x @ torch.ones(3),
    "cat": lambda x: torch.cat([x, torch.ones(3)]),
    "index of the CPU": lambda x: torch.ones(3)[x.long()],
    "layer": lambda x: nn.Linear(3, 3)(x),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_tensors_of_two_devices_cannot_be_mixed(mix: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device=GPU))


WAITS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), "item"),
    "if": (lambda x: 1 if x.sum() > 0 else 0, "item"),
    "tolist": (lambda x: x.tolist(), "plain copy to the host"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero"),
    "mask": (lambda x: x[x > 0], "aten::nonzero"),
    "masked write": (lambda x: x.__setitem__(x > 0, x[0]), "aten::_index_put_impl_"),
    "index of the CPU": (lambda x: x[torch.tensor([0, 2])], "aten::index.Tensor_out"),
    "equal": (lambda x: torch.equal(x, x + 1), "aten::equal"),
    "cpu": (lambda x: x.cpu(), "plain copy to the host"),
    "unpinned": (lambda x: torch.ones(3).to(GPU, non_blocking=True), "unpinned copy to the device"),
    "new tensor": (lambda x: torch.tensor([1.0, 2.0], device=GPU), "plain copy to the device"),
    "event": (lambda x: recorded().synchronize(), "synchronize event"),
    "stream": (lambda x: torch.cuda.current_stream().synchronize(), "synchronize stream"),
    "device": (lambda x: torch.cuda.synchronize(), "synchronize device"),
}


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@pytest.mark.parametrize(("wait", "name"), WAITS.values(), ids=WAITS)
def test_a_host_that_waits_is_reported_with_its_place(
    simulated_gpu: Simulation, wait: Callable[[Tensor], object], name: str
) -> None:
    x = torch.ones(3, device=GPU) * 2
    simulated_gpu.clear()
    wait(x)
    places = list(simulated_gpu.waits())
    assert any(place.startswith(f"{name} at tests/simulated_gpu/test_faults.py:") for place in places), places


def test_asynchronous_operations_are_not_waits(simulated_gpu: Simulation) -> None:
    x = torch.ones(3, device=GPU)
    pinned = torch.ones(3).pin_memory()
    simulated_gpu.clear()
    (x * 2 + pinned.to(GPU, non_blocking=True)).sum().to("cpu", non_blocking=False)
    assert [name.split(" at ")[0] for name in simulated_gpu.waits()] == ["plain copy to the host"]


def test_times_are_not_known_before_the_host_has_waited() -> None:
    first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    torch.ones(3, device=GPU) + 1
    second.record()
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(second)
    second.synchronize()
    assert first.elapsed_time(second) >= 0


def test_integer_products_follow_cublas(simulated_gpu: Simulation) -> None:
    def multiply(rows: int, inner: int = 16) -> Tensor:
        a = torch.ones(rows, inner, dtype=torch.int8, device=GPU)
        return torch._int_mm(a, torch.ones(inner, 8, dtype=torch.int8, device=GPU))

    assert multiply(17).tolist() == [[16] * 8] * 17
    with pytest.raises(RuntimeError, match="greater than 16"):
        multiply(16)
    with pytest.raises(RuntimeError, match="multiples of 8"):
        multiply(17, 12)


def test_fp8_products_follow_cublas(simulated_gpu: Simulation) -> None:
    a = torch.ones(16, 32, device=GPU).to(torch.float8_e4m3fn)
    b = torch.ones(16, 32, device=GPU).to(torch.float8_e4m3fn)
    one = torch.ones((), device=GPU)
    assert torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16).float().amax().item() == 32
    with pytest.raises(RuntimeError, match="column major"):
        torch._scaled_mm(a, b.t().contiguous(), one, one, out_dtype=torch.bfloat16)
    with simulated_gpu.configured(capability=8.6), pytest.raises(RuntimeError, match="compute capability"):
        torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def test_a_training_step_matches_the_cpu(simulated_gpu: Simulation) -> None:
    """The step uses CUDA autocast, autograd's thread, a loss scale and a fused optimizer."""
    ours, theirs = trained(GPU, torch.float16), trained(torch.device("cpu"), torch.bfloat16)
    assert all(torch.allclose(a, b, atol=2e-2) for a, b in zip(ours, theirs, strict=True))
    assert kinds(simulated_gpu) == set()


def trained(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return the weights of a small model after three steps."""
    generator = torch.Generator().manual_seed(61)
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.LayerNorm(64), nn.Linear(64, 8))
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    x, y = (torch.randn(16, size, generator=generator).to(device) for size in (32, 8))
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for _ in range(3):
        with torch.autocast(device.type, dtype):
            loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_accumulates_as_on_cuda(function: Callable[..., Tensor]) -> None:
    x = torch.linspace(-3, 3, 8, dtype=torch.float16)
    actual = function(x.to(GPU), 0, dtype=torch.float32)
    assert actual.dtype == torch.float32 and torch.equal(actual.cpu(), function(x.float(), 0))


def test_a_storage_can_be_freed_and_reallocated(simulated_gpu: Simulation) -> None:
    """FSDP does this with the weights of a block."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    x = torch.arange(4.0, device=GPU)
    x.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == before
    x.untyped_storage().resize_(32)
    x.copy_(torch.ones(4))
    x.untyped_storage().resize_(16)
    assert x.tolist() == [1] * 4
