"""The GPU memory and the largest batch that --fit assumes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.memory.planner.gpus import GIB, Gpu
from library.memory.planner.prediction import CONTEXT_BYTES
from library.processes import Processes
from library.training.models.requests import RequestedRun
from library.training.planning import fit_run
from library.training.planning.counted_step import count_pinned_batches
from library.training.planning.fit_run import count_adapter_run, largest_batch, measure_gpu
from library.training.planning.meta_run import BatchShape, fake_batch, shape_of_batch
from tests.unit.data.builders import SPEC
from tests.unit.training.test_checks import make_options
from tests.unit.training.test_text_caching import Board


def test_the_largest_batch_has_the_most_pixels() -> None:
    shapes = [(4, ((512, 512),)), (1, ((1024, 1152),)), (2, ((768, 768),)), (1, ((1024, 1024),))]
    plan: Any = SimpleNamespace(batch_shapes=lambda: iter(shapes))
    assert largest_batch(plan) == BatchShape(1, 1024, 1152)
    shapes.append((1, ((1024, 1024), (512, 512))))  # with a reference image
    assert largest_batch(plan) == BatchShape(1, 1024, 1024, ((512, 512),))


def test_processes_plan_with_the_least_free_memory_and_the_speed_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three processes finds a different amount of free memory and measures a different speed."""
    free = {0: 9 * GIB, 1: 7 * GIB, 2: 8 * GIB}
    board = Board()

    def gpu_of_rank(rank: int) -> Gpu:
        processes = Processes(rank=rank, count=3, local_rank=rank, local_count=3, store=board)
        return measure_gpu("auto", "bf16", processes)

    ranks = iter(range(100, 200))
    monkeypatch.setattr(
        fit_run, "benchmark_gpu", lambda device, room, dtype: Gpu("x", room, next(ranks), next(ranks), next(ranks))
    )
    with ThreadPoolExecutor(3) as pool, monkeypatch.context() as patch:
        patch.setattr(fit_run, "free_memory", lambda device: free.popitem()[1])
        gpus_of_ranks = list(pool.map(gpu_of_rank, (0, 1, 2)))
    assert {gpu.memory_bytes for gpu in gpus_of_ranks} == {7 * GIB}
    assert len({(gpu.flops, gpu.bus) for gpu in gpus_of_ranks}) == 1


def test_auto_counts_the_context_that_exists_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare context, which already exists at that point, takes about 0.35 GiB of the 0.7 that are planned for one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 12 * GIB))
    room = fit_run.free_memory(torch.device("cuda"))
    assert room == 10 * GIB + fit_run.BARE_CONTEXT_BYTES < 10 * GIB + CONTEXT_BYTES


def test_a_third_party_module_that_needs_real_values_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("shape is invalid")

    monkeypatch.setattr(fit_run, "count_run", fails)
    shape, device = BatchShape(1, 64, 64), torch.device("cpu")
    arch: Any = SimpleNamespace(text_cache=None)
    with pytest.raises(ValueError, match=r"--fit cannot count what --network_module lycoris.kohya does \(RuntimeError"):
        count_adapter_run(RequestedRun.resolve(make_options(network_module="lycoris.kohya"), arch), shape, device)
    with pytest.raises(RuntimeError, match=r"^shape is invalid$"):
        count_adapter_run(RequestedRun.resolve(make_options(network_module="networks.lora"), arch), shape, device)


@pytest.mark.parametrize("has_latents", [True, False])
def test_a_counted_batch_has_the_reference_images_of_the_described_one(has_latents: bool) -> None:
    shape = BatchShape(2, 64, 32, ((48, 16), (64, 64)))
    arch: Any = SimpleNamespace(codec=SimpleNamespace(spec=SPEC), text=SimpleNamespace(max_tokens=3))
    batch = fake_batch(arch, shape, None, has_latents)
    pixels, latents = (
        [tuple(tensor.shape) for tensor in part] for part in (batch.reference_pixels, batch.reference_latents)
    )
    assert pixels == ([] if has_latents else [(2, 3, 16, 48), (2, 3, 64, 64)])
    assert latents == ([(2, 4, 2, 6), (2, 4, 8, 8)] if has_latents else [])
    sized = replace(batch, sizes_B6=torch.tensor([[32.0, 64, 0, 0, 32, 64]] * 2))
    assert shape_of_batch(sized, SPEC.downscale) == shape


def test_batches_that_are_copied_count_as_pinned_memory() -> None:
    """Two batches of 2 x 4 x 4 x 8 latents and of captions, in powers of two; features of the host are not copied."""
    arch: Any = SimpleNamespace(codec=SimpleNamespace(spec=SPEC), text=SimpleNamespace(max_tokens=3))
    features = {"states": torch.empty(2, 3, 5), "ids": torch.empty(2, 3)}
    batch = fake_batch(arch, BatchShape(2, 64, 32), features, True)
    assert count_pinned_batches(batch, ("ids",)) == 2 * (1024 + 128)
    assert count_pinned_batches(batch, ()) == 2 * (1024 + 128 + 32)
