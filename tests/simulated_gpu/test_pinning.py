"""A system that refuses to pin memory, as WSL2 does beyond about a gigabyte."""

import gc
import logging
from pathlib import Path

import pytest
import torch

from library.memory.activations import PinnedBudget
from library.memory.offload.pinning import pin
from library.memory.offload.ring import Ring
from library.memory.offload.streams import StagedStreams, staging_bytes
from library.memory.pinned import warn_of_refusal
from tests.simulated_gpu.device import Simulation
from tests.simulated_gpu.test_runs import OFFLOADED, Run, assert_same, run, waits  # noqa: F401
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
NUM_BLOCKS, NUM_BYTES = 6, 4096


def masters_of(count: int = NUM_BLOCKS) -> list[torch.Tensor]:
    return [torch.full((NUM_BYTES,), number, dtype=torch.uint8) for number in range(count)]


def assert_streams(masters: list[torch.Tensor], streams: StagedStreams) -> None:
    """Assert that two passes deliver every block and that no later kernel raises the error of a failed pin."""
    ring = Ring(masters, streams)
    order = [*range(len(masters)), *reversed(range(len(masters)))] * 2
    means = [ring.need(number).float().mean() for number in order]
    assert torch.stack(means).tolist() == order


def test_blocks_that_cannot_be_pinned_are_staged(simulated_gpu: Simulation) -> None:
    """CUDA keeps the error of a failed call, which the next kernel launch would raise."""
    masters, before = masters_of(), simulated_gpu.stats()["pinned"]
    with simulated_gpu.configured(pin_limit_bytes=before + 4 * NUM_BYTES):
        pinned = pin(masters, reserve=2 * NUM_BYTES)
        assert pinned.reason == "cudaHostRegister failed: out of memory"
        assert [master.is_pinned() for master in masters] == [True, False, False, False, True, False]
        streams = StagedStreams(2, NUM_BYTES, torch.device("cuda"), pinned.addresses)
        assert len(streams.staging) == 2
        assert_streams(masters, streams)


@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_a_block_is_staged_in_pieces(simulated_gpu: Simulation, num_slots: int) -> None:
    assert_streams(masters_of(), StagedStreams(num_slots, NUM_BYTES, torch.device("cuda"), piece=1000))


def test_blocks_are_copied_from_pageable_memory_if_nothing_can_be_pinned(
    simulated_gpu: Simulation, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens on WSL2 once other programs have pinned the available gigabyte."""
    masters = masters_of()
    warn_of_refusal.cache_clear()
    torch.cuda.synchronize()
    with simulated_gpu.configured(pin_limit_bytes=0), caplog.at_level(logging.WARNING):
        pinned = pin(masters)
        assert pinned.addresses == frozenset()
        streams = StagedStreams(2, NUM_BYTES, torch.device("cuda"), pinned.addresses)
        assert streams.staging == [] and "the system refuses to pin more main memory (CUDA error" in caplog.text
        assert_streams(masters, streams)


def test_staging_takes_128_mib_regardless_of_block_size() -> None:
    """FLUX.1's largest block has 680 MB; two buffers of that size would be 2 GiB, which WSL2 cannot pin."""
    assert staging_bytes(680_000_000) == 128 << 20
    assert staging_bytes(3 << 20) == 2 * (4 << 20), "torch rounds up to a power of two"


def test_inputs_beyond_the_budget_are_pageable_until_others_are_freed() -> None:
    """1000 numbers of 4 bytes are pinned as 4096 bytes."""
    budget, values = PinnedBudget(3 * 4096), torch.ones(1000, device="cuda")
    copies = [budget.allocate(values) for _ in range(4)]
    assert [copy.is_pinned() for copy in copies] == [True, True, True, False] and budget.num_bytes == 3 * 4096
    del copies[0]
    assert budget.num_bytes == 2 * 4096 and budget.allocate(values).is_pinned()


SWAPS = ("--blocks_to_swap", BASES["flux"].blocks_to_swap, "--gradient_checkpointing")
LIMITED = [
    ((), 0),
    (("--cache_latents",), 0),
    (("--cache_latents", *SWAPS), 300_000),
    (("--cache_latents", *OFFLOADED), 100_000),
    (("--cache_latents", *SWAPS, *OFFLOADED), 600_000),
]
STAGED = frozenset({"synchronize event at library/memory/offload/streams.py (stage)"})


@pytest.mark.parametrize(("options", "limit"), first_is_fast(LIMITED))
def test_a_run_trains_where_little_can_be_pinned(
    run: Run,  # noqa: F811
    simulated_gpu: Simulation,
    options: tuple[str, ...],
    limit: int,
    tmp_path: Path,
) -> None:
    """It is slower, and the adapter is the same."""
    gc.collect()
    torch.cuda.synchronize()
    warn_of_refusal.cache_clear()
    with simulated_gpu.configured(pin_limit_bytes=simulated_gpu.stats()["pinned"] + limit):
        done = run("flux", *options, allowed=STAGED)
    refusals = done.stderr.count("the system refuses to pin more main memory (CUDA error: out of memory")
    assert refusals == 1 or "cannot be pinned: cudaHostRegister failed: out of memory" in done.stderr
    run("flux", *options, folder="plain")
    assert_same(tmp_path / "out", tmp_path / "plain")
