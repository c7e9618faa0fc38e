"""Plans of --fit: what is assumed, logged and advised."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.data.description.captions import CaptionRules
from library.memory.planner.choice import Allowed, choose
from library.memory.planner.gpus import GIB, TYPICAL, Gpu
from library.memory.planner.prediction import CONTEXT_BYTES, OPTIMIZER_STEP, CountedStep, MemoryMode, predict
from library.memory.planner.stages import StageMemory
from library.processes.process_group import Processes
from library.training.models.requests import RequestedRun
from library.training.planning import advice, correction, fit_run
from library.training.planning.advice import lines, memory_hints, pick_evenly
from library.training.planning.correction import Gauge, MemoryWatch
from library.training.planning.counted_step import count_pinned_batches
from library.training.planning.counting import CountedRun, count_run
from library.training.planning.fit import Fit, fit_to
from library.training.planning.fit_run import (
    count_adapter_run,
    count_captions,
    find_longest_caption,
    largest_batch,
    measure_gpu,
)
from library.training.planning.meta_run import BatchShape, fake_batch, longest_caption, shape_of_batch
from library.training.planning.previews import CountedPreview
from library.training.step.conditioning import MEMO_BYTES, CaptionMemo
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES
from tests.unit.data.builders import SPEC
from tests.unit.memory.planner.test_choice import counted_step
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


# The log lines about a chosen plan.

IMAGES = StageMemory("encoding images", "vae_batch_size", 5 * GIB, GIB, GIB, streamed_weights=GIB)


def fitted(gib: float, *stages: StageMemory, adapter: int = 0) -> Fit:
    options: Any = make_options(network_module="networks.lora")
    counted = CountedRun(options, BatchShape(1, 64, 64), counted_step(adapter), stages)
    return fit_to(counted, Gpu("made up", int(gib * GIB), 1e12, 1e9, 1e12))


def test_the_stage_that_needs_the_most_memory_is_named() -> None:
    training = predict(counted_step(), MemoryMode(), Gpu("made up", 0, 1e12, 1e9, 1e12)).device_bytes / GIB
    lines = list(fitted(7.5, IMAGES).lines())
    # 5 GiB of weights and 2.1 of two images and a context of 0.7 do not fit, so one is encoded.
    assert "encoding images: 6.7 GiB with --vae_batch_size 1" in lines
    assert "peak of the run: encoding images, 6.7 GiB" in lines
    assert f"peak of the run: training (forward and backward pass), {training:.1f} GiB" in fitted(4.5).lines()


def test_an_optimizer_step_that_needs_more_memory_than_the_pass_is_named() -> None:
    step = predict(counted_step(adapter=4 * GIB), MemoryMode(), Gpu("made up", 0, 1e12, 1e9, 1e12))
    assert step.peak == OPTIMIZER_STEP  # state and gradients are three adapters, a pass keeps 2.4 GiB
    plan = fitted(60, adapter=4 * GIB)
    assert plan.choice.chosen is not None and plan.choice.chosen.device_bytes > CONTEXT_BYTES
    assert any(line.startswith("peak of the run: training (optimizer step), ") for line in plan.lines())


def test_previews_are_planned_on_top_of_the_memory_that_training_keeps() -> None:
    """Weights, adapter and optimizer state, and the VAE; the make_options-up step has 0.4 GiB of weights."""
    step, preview = counted_step(), CountedPreview(1024, 768, GIB, 2 * GIB)
    roomy, tight = (
        fit_to(
            CountedRun(fitted(8).options, BatchShape(1, 64, 64), step, (), preview), Gpu("made up", gib * GIB, 1, 1, 1)
        )
        for gib in (8, 3)
    )
    assert "previews of 1024x768: 4.2 GiB" in roomy.lines()
    assert "peak of the run: previews, 4.2 GiB" in roomy.lines()
    more = "more than there is: the VAE decodes them in tiles, or on the processor"
    assert any(line.startswith("previews of 1024x768: 4.") and line.endswith(more) for line in tight.lines())


def test_streamed_encoders_need_less_memory() -> None:
    lines = list(fitted(4, IMAGES).lines())
    assert "encoding images: 3.8 GiB with --vae_batch_size 2, layers streamed from main memory" in lines


def test_the_search_space_follows_from_the_options() -> None:
    assert fitted(8).allowed == Allowed(offloads_inputs=(False, True))
    assert choose(counted_step(), fitted(8).allowed, fitted(8).choice.gpu).chosen == fitted(8).choice.chosen


# The advice when a step runs out of memory: fastest first, each option saving more than the previous one.

LINE = re.compile(r"(--.*) needs ([\d.]+) GiB less and takes (?:(\d+) % longer|no longer)")


def hints(used: MemoryMode, **allowed: Any) -> list[tuple[str, float, int]]:
    matches = [LINE.fullmatch(line) for line in lines(counted_step(), used, Allowed(**allowed), TYPICAL[0])]
    return [(m[1], float(m[2]), int(m[3] or 0)) for m in matches if m is not None]


def test_each_line_saves_more_and_takes_longer_than_the_previous_one() -> None:
    advice = hints(MemoryMode(), weight_formats=(None, "nf4"))
    assert len(advice) >= 4
    assert [saved for _, saved, _ in advice] == sorted(saved for _, saved, _ in advice)  # to a tenth of a GiB
    assert [percent for *_, percent in advice] == sorted(percent for *_, percent in advice)


def test_recomputing_all_blocks_of_the_made_up_step_costs_a_third() -> None:
    """Each of 8 blocks keeps 300 MiB, or 10 if recomputed; the running block keeps all; the allocator adds 5 %."""
    options = [
        line for line in hints(MemoryMode(), offloads_inputs=(False,), recompute_every=(1,)) if "blocks" not in line[0]
    ]
    assert options == [("--gradient_checkpointing", round(7 * 290 * 1.05 / 1024, 1), 33)]


def test_options_already_in_use_are_not_advised() -> None:
    used = MemoryMode("nf4_double", 1, True, 6)
    assert hints(used, weight_formats=(None, "nf4_double")) == []


def test_a_long_list_of_advice_is_shortened() -> None:
    assert pick_evenly([str(i) for i in range(14)]) == ["1", "4", "7", "10", "13"]
    assert pick_evenly(["1", "2"]) == ["1", "2"]
    assert pick_evenly([]) == []


def test_third_party_modules_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "count_run", None)
    arch: Any = SimpleNamespace(text_cache=None)
    requested = RequestedRun.resolve(make_options(network_module="lycoris.kohya"), arch)
    run: Any = SimpleNamespace(context=SimpleNamespace(device=None))
    batch: Any = None  # counting would fail
    assert memory_hints(requested, run, batch) == []
