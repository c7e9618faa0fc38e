"""The GPU memory and the largest batch that --fit assumes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.data.description.captions import CaptionRules
from library.memory.planner.gpus import GIB, TYPICAL, Gpu
from library.memory.planner.prediction import CONTEXT_BYTES, CountedStep, MemoryMode, predict
from library.processes.process_group import Processes
from library.training.models.requests import RequestedRun
from library.training.planning import correction, fit_run
from library.training.planning.correction import Gauge, MemoryWatch
from library.training.planning.counted_step import count_pinned_batches
from library.training.planning.counting import count_run
from library.training.planning.fit_run import (
    count_adapter_run,
    count_captions,
    find_longest_caption,
    largest_batch,
    measure_gpu,
)
from library.training.planning.meta_run import BatchShape, fake_batch, longest_caption, shape_of_batch
from library.training.step.conditioning import MEMO_BYTES, CaptionMemo
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES
from tests.unit.data.builders import SPEC
from tests.unit.training.test_checks import make_options
from tests.unit.training.test_loop import batch_of
from tests.unit.training.test_text_caching import Board


def test_the_largest_batch_has_the_most_pixels() -> None:
    shapes = [(4, ((512, 512),)), (1, ((1024, 1152),)), (2, ((768, 768),)), (1, ((1024, 1024),))]
    plan: Any = SimpleNamespace(batch_shapes=lambda: iter(shapes))
    assert largest_batch(plan) == BatchShape(1, 1024, 1152)
    shapes.append((1, ((1024, 1024), (512, 512))))  # with a reference image
    assert largest_batch(plan) == BatchShape(1, 1024, 1024, ((512, 512),))


def subset(captions: list[str], class_tokens: str | None = None, **rules: Any) -> Any:
    config = SimpleNamespace(captions=CaptionRules(**rules), class_tokens=class_tokens)
    return SimpleNamespace(images=SimpleNamespace(captions=captions), config=config)


@pytest.mark.parametrize(
    ("subsets", "num_tokens"),
    [
        ([subset(["a b c", "a"])], 3),
        ([subset(["a b c"], caption_prefix="x y ")], 5),
        ([subset(["a"]), subset(["a b\nc d e f"], enable_wildcard=True)], 4),
        ([subset(["a b", ""], "p q r")], 3),
        ([subset(["a b c"]), subset([])], None),  # not read before the run
        ([subset(["", ""])], None),
    ],
)
def test_the_longest_caption_is_that_of_the_data_set(subsets: list[Any], num_tokens: int | None) -> None:
    plan: Any = SimpleNamespace(datasets=[SimpleNamespace(subsets=subsets)])
    assert find_longest_caption(plan, lambda text: len(text.split())) == num_tokens


@pytest.mark.parametrize(
    ("subsets", "count"),
    [
        ([subset(["a", "b", "a"]), subset(["b", "c"], "d")], 5),  # with the empty one
        ([subset(["a", "b"], caption_prefix="x")], 4),
        ([subset(["a, b"], shuffle_caption=True)], None),
        ([subset(["a"]), subset([])], None),
    ],
)
def test_different_captions_of_the_data_set_are_counted(subsets: list[Any], count: int | None) -> None:
    plan: Any = SimpleNamespace(datasets=[SimpleNamespace(subsets=subsets)])
    assert count_captions(plan) == count


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_features_of_uncached_captions_are_planned_as_a_run_keeps_them(name: str, tmp_path: Path) -> None:
    """The peak of a step has those of its own captions only."""
    words = [*BASES[name].build(tmp_path), "--cache_latents", "--network_train_unet_only"]
    options, arch = opened_with(name, words)
    run, shape = RequestedRun.resolve(options, arch), BatchShape(*BASES[name].count_shape)
    encoders = arch.load.text_encoders()
    memo = CaptionMemo(lambda captions: arch.text.encode(encoders, arch.text.tokenize(captions)))
    memo([longest_caption(arch), "a"])  # both are padded

    def count(num_captions: int | None) -> CountedStep:
        return count_run(run, replace(shape, num_captions=num_captions), torch.device("cpu")).step

    few, all_of_them = count(2), count(None)
    assert few.feature_bytes == memo.num_bytes and 0.99 * MEMO_BYTES < all_of_them.feature_bytes <= MEMO_BYTES
    costs = [predict(step, MemoryMode(), TYPICAL[0]) for step in (few, all_of_them)]
    more = all_of_them.feature_bytes - few.feature_bytes
    assert costs[1].tensor_bytes - costs[0].tensor_bytes == costs[1].device_bytes - costs[0].device_bytes == more


def test_no_features_are_kept_of_cached_captions_and_of_trained_encoders(tmp_path: Path) -> None:
    words = [*BASES["flux"].build(tmp_path), "--cache_latents"]
    shape = BatchShape(*BASES["flux"].count_shape, num_captions=5)
    for more in (["--network_train_unet_only", "--cache_text_encoder_outputs"], []):
        run = RequestedRun.resolve(*opened_with("flux", [*words, *more]))
        assert count_run(run, shape, torch.device("cpu")).step.feature_bytes == 0


@pytest.mark.parametrize(("name", "is_shorter"), [("moss_image", True), ("flux", False)])
def test_captions_are_counted_as_long_as_the_data_set_has_them(name: str, is_shorter: bool, tmp_path: Path) -> None:
    """FLUX.1 pads captions to the maximum."""
    options, arch = opened_with(name, [*BASES[name].build(tmp_path), "--cache_latents", "--network_train_unet_only"])
    run, shape = RequestedRun.resolve(options, arch), BatchShape(*BASES[name].count_shape)
    longest, short = (
        sum(segment.flops for segment in count_run(run, batch, torch.device("cpu")).step.timeline.plain.segments)
        for batch in (shape, replace(shape, num_tokens=3))
    )
    assert short < 0.99 * longest if is_shorter else short == longest


@pytest.mark.parametrize(("captions", "is_over"), [(["a b"], False), (["a", "a b c"], True)])
def test_the_watch_waits_for_the_largest_images_and_the_longest_caption(captions: list[str], is_over: bool) -> None:
    batch = replace(batch_of(1.0), captions=captions)
    num_pixels = correction.num_pixels(batch)
    shape = BatchShape(1, num_pixels, 1, num_tokens=3)
    fitted: Any = SimpleNamespace(
        choice=SimpleNamespace(chosen=SimpleNamespace(tensor_bytes=1100)),
        counted=SimpleNamespace(batch=shape, step=SimpleNamespace(feature_bytes=1000)),
    )
    arch = SimpleNamespace(text=SimpleNamespace(count_tokens=lambda text: len(text.split())))
    run: Any = SimpleNamespace(context=SimpleNamespace(arch=arch, captions=SimpleNamespace(num_bytes=0)))
    watch = MemoryWatch(run, fitted, Gauge(lambda: 99, lambda: None))
    for _ in range(2):
        watch.before_step()
        list(watch.noting(iter([batch])))
        watch.after_step()
    assert watch.is_over == is_over


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
