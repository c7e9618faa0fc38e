"""The planner chooses the fastest plan that fits, from formulas that match what the formats use."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.format_errors import errors_of
from library.memory.codecs.weight_format import load_format
from library.memory.devices import bytes_of
from library.memory.frozen import freeze_layer
from library.memory.pinned import max_pinned_bytes
from library.memory.planner import measured
from library.memory.planner.choice import Allowed, choose
from library.memory.planner.gpus import GIB, Gpu, MemorySize, parse_size, typical_gpu
from library.memory.planner.measured import benchmark_gpu
from library.memory.planner.prediction import (
    ALLOCATOR_SHARE,
    CONTEXT_BYTES,
    CountedStep,
    GradientlessPasses,
    MemoryMode,
    predict,
)
from library.memory.planner.repeats import Repeats
from library.memory.planner.speed import Work
from library.memory.planner.stages import StageMemory, max_images
from library.memory.planner.steps import CountedOptimizer, CountedPass, Segment, Timeline
from library.memory.planner.table import format_table
from library.memory.planner.weights import Matrix, ModelWeights, StorageCost
from tests.unit.memory.planner.made_up import Adapter, MadeUp, allocated_peak
from tests.unit.memory.planner.test_steps import model_of
from tests.weight_formats import CODECS

MIB = 2**20
NUM_BLOCKS = 8
KEPT, KEPT_WHEN_RECOMPUTED, BLOCK_FLOPS = 300 * MIB, 10 * MIB, 4 * 10**12
WEIGHT = Matrix(1024, 10 * 1024, 2)  # 20 MiB in 16 bits


def passes(kept: int, flops_backward: int, num_blocks: int = NUM_BLOCKS) -> CountedPass:
    """Return blocks that keep `kept` bytes each in the forward pass and free them in the backward pass."""
    blocks = tuple(nn.Identity() for _ in range(num_blocks))
    forward = [Segment(("forward", i), kept, kept, BLOCK_FLOPS) for i in range(num_blocks)]
    # During its backward pass a recomputed block holds everything that it would have kept otherwise.
    backward = [Segment(("backward", i), -kept, KEPT - kept, flops_backward) for i in reversed(range(num_blocks))]
    return CountedPass((*forward, *backward), blocks, (KEPT_WHEN_RECOMPUTED,) * num_blocks)


def evenly(count: int) -> Collection[int]:
    return {i * (NUM_BLOCKS - 1) // count for i in range(count)}


def counted_step(adapter: int = 0, held: int = 0) -> CountedStep:
    plain, recomputed = passes(KEPT, 2 * BLOCK_FLOPS), passes(KEPT_WHEN_RECOMPUTED, 3 * BLOCK_FLOPS)
    weights = ModelWeights(50 * MIB, (WEIGHT,), ((WEIGHT, WEIGHT),) * NUM_BLOCKS)
    optimizer = CountedOptimizer(2 * adapter, 2 * adapter)
    timeline = Timeline.build(plain, recomputed, Repeats({}, {}))
    encoder = ModelWeights(3 * MIB, (WEIGHT,), ())
    return CountedStep(
        timeline, 0, weights, (encoder,), (None, None), 7 * MIB, adapter, adapter, held, optimizer, evenly,
        NUM_BLOCKS - 2,
    )  # fmt: skip


def make_gpu(memory: int, bus: float = 1e9) -> Gpu:
    return Gpu("made up", memory, 1e12, bus, 1e12)


def test_the_memory_of_a_plan_is_the_sum_of_its_parts() -> None:
    plain = predict(counted_step(adapter=MIB), MemoryMode(), make_gpu(0))
    weights = 50 * MIB + 20 * MIB + NUM_BLOCKS * 40 * MIB + 23 * MIB + 7 * MIB
    changing = MIB + 2 * MIB + NUM_BLOCKS * KEPT
    assert (plain.weight_bytes, plain.tensor_bytes) == (weights, weights + changing)
    assert plain.device_bytes == pytest.approx(weights + (1 + ALLOCATOR_SHARE) * changing + CONTEXT_BYTES)
    assert plain.seconds == pytest.approx(NUM_BLOCKS * 3 * 4)


def test_memory_traffic_and_kernel_launches_add_to_the_time() -> None:
    """8 blocks with 12 TFLOP in all, on a GPU of 1 TFLOP/s and 1 TB/s."""
    step = counted_step()
    quick = predict(step, MemoryMode(), make_gpu(0)).seconds
    segments = [replace(segment, moved=5 * 10**11, launches=1000) for segment in step.timeline.plain.segments]
    plain = replace(step.timeline.plain, segments=tuple(segments))
    busy = predict(replace(step, timeline=replace(step.timeline, plain=plain)), MemoryMode(), make_gpu(0)).seconds
    assert quick == pytest.approx(96)
    assert busy - quick == pytest.approx(16 * (0.5 + 1000 * 20e-6))


def test_recomputing_every_second_block_saves_half_and_costs_half() -> None:
    predictions = [predict(counted_step(), MemoryMode(recompute_every=every), make_gpu(0)) for every in (None, 2, 1)]
    none, half, all_blocks = (f.tensor_bytes - f.weight_bytes for f in predictions)
    assert none - half == NUM_BLOCKS // 2 * (KEPT - KEPT_WHEN_RECOMPUTED)
    # The last recomputed block comes on top of everything kept before it.
    assert all_blocks == NUM_BLOCKS * KEPT_WHEN_RECOMPUTED + KEPT - KEPT_WHEN_RECOMPUTED
    assert half > all_blocks
    assert [f.seconds for f in predictions] == pytest.approx([96, 112, 128])


def test_offloaded_blocks_need_two_slots_and_take_time_on_a_slow_bus() -> None:
    step, mode = counted_step(), MemoryMode(num_offloaded=3)
    staying = predict(step, MemoryMode(), make_gpu(0))
    fast, slow = (predict(step, mode, make_gpu(0, bus)) for bus in (1e12, 3e6))
    assert staying.tensor_bytes - fast.tensor_bytes == 3 * 40 * MIB - 2 * 40 * MIB
    assert fast.seconds == pytest.approx(96 * (1 + 0.05 * 3 / 8))
    streamed = 3 * 40 * MIB / 3e6  # longer than 32 s of arithmetic forward, shorter than 64 s backward
    assert slow.seconds == pytest.approx((streamed + 64) * (1 + 0.05 * 3 / 8))
    assert fast.host_bytes == 3 * 40 * MIB


def test_each_further_slot_takes_a_block_of_memory_and_a_single_one_copies_and_computes_in_turn() -> None:
    step, gpu = counted_step(), make_gpu(0, 3e6)
    one, two, four = (predict(step, MemoryMode(num_offloaded=3, num_slots=n), gpu) for n in (1, 2, 4))
    assert four.tensor_bytes - two.tensor_bytes == 2 * (two.tensor_bytes - one.tensor_bytes) == 2 * 40 * MIB
    assert four.seconds == two.seconds
    copied = 3 * 40 * MIB / 3e6
    assert one.seconds == pytest.approx((96 + 2 * copied) * (1 + 0.05 * 3 / 8))
    allowed = Allowed(num_slots=3)
    assert {candidate.mode.num_slots for candidate in choose(step, allowed, gpu).candidates} == {3}


@pytest.mark.parametrize("shared_by", [2, 8])
def test_a_sharded_base_takes_its_share_and_the_blocks_being_gathered(shared_by: int) -> None:
    """The weights are 20 and 8 x 40 MiB; `PEAK_BLOCKS` is measured as 3.6 blocks."""
    unsharded, shared = (
        predict(counted_step(), MemoryMode(shared_by=number), make_gpu(0)) for number in (1, shared_by)
    )
    sharded = (20 + NUM_BLOCKS * 40) * MIB
    assert unsharded.tensor_bytes - shared.tensor_bytes == sharded - sharded / shared_by - 3.6 * 40 * MIB
    assert shared.seconds == unsharded.seconds


def test_nothing_is_offloaded_if_the_base_is_sharded() -> None:
    choice = choose(counted_step(), Allowed(shared_by=4), make_gpu(0))
    assert {candidate.mode.num_offloaded for candidate in choice.candidates} == {0} and choice.chosen is None


def test_inputs_of_three_blocks_stay_and_all_copies_overlap_with_compute() -> None:
    step, slow = counted_step(), make_gpu(0, bus=1e3)
    stays, waits = (
        predict(step, MemoryMode(recompute_every=1, offloads_inputs=wait), make_gpu(0)) for wait in (False, True)
    )
    assert waits.host_bytes == NUM_BLOCKS * KEPT_WHEN_RECOMPUTED
    assert stays.tensor_bytes - waits.tensor_bytes == (NUM_BLOCKS - 3) * KEPT_WHEN_RECOMPUTED
    assert waits.seconds == stays.seconds
    assert predict(step, waits.mode, slow).seconds == pytest.approx(2 * NUM_BLOCKS * KEPT_WHEN_RECOMPUTED / 1e3)


@pytest.mark.parametrize("memory_mib", range(1500, 4400, 230))
def test_the_choice_leaves_the_spare_and_is_the_most_exact_and_simplest_near_the_fastest(memory_mib: int) -> None:
    step, on = counted_step(adapter=3 * MIB), make_gpu(memory_mib * MIB, 2e8)
    formats = (None, "int8", "nf4")
    every_way = [
        predict(step, MemoryMode(form, every, wait and every is not None, number), on)
        for form, every, wait, number in product(formats, (None, 3, 2, 1), (False, True), range(NUM_BLOCKS - 1))
    ]
    choice = choose(step, Allowed(weight_formats=formats), on)
    fitting = [prediction for prediction in every_way if prediction.device_bytes <= on.memory_bytes]
    if not fitting:
        assert choice.chosen is None
        assert choice.least.device_bytes == min(prediction.device_bytes for prediction in every_way)
        return
    others = [prediction for prediction in fitting if prediction.mode.weight_format != "nf4"] or fitting
    spare = [p for p in others if p.device_bytes <= on.memory_bytes - max(GIB // 2, on.memory_bytes // 20)]
    assert choice.chosen is not None and choice.lacks_spare == (not spare)
    if not spare:
        assert choice.chosen.device_bytes == min(prediction.device_bytes for prediction in others)
        return
    near = [p for p in spare if p.seconds <= 1.15 * min(prediction.seconds for prediction in spare)]
    exact = [p for p in near if (p.error or 0) == min(prediction.error or 0 for prediction in near)]
    assert choice.chosen.error == exact[0].error
    assert choice.chosen.mode.complexity == min(prediction.mode.complexity for prediction in exact)


def test_four_bits_are_chosen_only_where_nothing_more_exact_fits_both_memories() -> None:
    step, allowed = (
        counted_step(),
        Allowed(weight_formats=(None, "nf4"), recompute_every=(1,), offloads_inputs=(False,)),
    )
    gpu = make_gpu(predict(step, MemoryMode(recompute_every=1), make_gpu(0)).device_bytes - 1, 1e12)
    exact = choose(step, allowed, gpu).chosen
    assert exact is not None and exact.mode.weight_format is None and exact.mode.num_offloaded > 0
    without = choose(step, allowed, replace(gpu, main_memory_bytes=0)).chosen
    assert without is not None and without.mode == MemoryMode("nf4", 1)


@pytest.mark.parametrize(("bus", "offloads"), [(1e12, True), (3e6, False)])
def test_offloading_is_chosen_only_if_it_saves_the_worth(bus: float, offloads: bool) -> None:
    """Recomputing takes a third longer. Offloading takes 4 % longer on a fast bus, and on a slow one a third."""
    step, allowed = counted_step(), Allowed(recompute_every=(None, 1), offloads_inputs=(False,))
    size = predict(step, MemoryMode(num_offloaded=4), make_gpu(0)).device_bytes + GIB // 2
    choice = choose(step, allowed, make_gpu(size, bus))
    assert choice.chosen is not None and (choice.chosen.mode.num_offloaded > 0) == offloads


def test_blocks_that_cannot_be_pinned_are_copied_at_staging_speed() -> None:
    """Three blocks of 40 MiB are offloaded and 100 MiB can be pinned; both passes copy, and nothing is computed."""
    step, mode = counted_step(), MemoryMode(num_offloaded=3)
    gpu = replace(make_gpu(0, bus=100 * MIB), flops=float("inf"), pinnable_bytes=100 * MIB)
    for staging, seconds in ((10 * MIB, 1 + 2), (1000 * MIB, 1.2)):  # no faster than the bus
        predicted = predict(step, mode, replace(gpu, staging=staging)).seconds
        assert predicted == pytest.approx(2 * seconds * (1 + 0.05 * 3 / 8))
    assert predict(step, mode, replace(gpu, pinnable_bytes=None)).seconds == pytest.approx(2.4 * (1 + 0.05 * 3 / 8))


def test_inputs_are_offloaded_only_where_they_can_be_pinned() -> None:
    """Eight inputs of 10 MiB, each pinned as 16 MiB: beside weights they have half of what can be pinned."""
    step, allowed = counted_step(), Allowed(recompute_every=(1,), num_offloaded=0)
    kept, offloaded = (
        predict(step, MemoryMode(recompute_every=1, offloads_inputs=x), make_gpu(0)) for x in (False, True)
    )
    assert kept.device_bytes > offloaded.device_bytes and offloaded.host_bytes == 80 * MIB
    gpu = make_gpu(offloaded.device_bytes)
    for pinnable, is_chosen in ((None, True), (128 * MIB, True), (127 * MIB, False)):
        chosen = choose(step, allowed, replace(gpu, pinnable_bytes=pinnable)).chosen
        assert (chosen is not None and chosen.mode.offloads_inputs) == is_chosen
    beside = replace(allowed, num_offloaded=2)  # two blocks of 40 MiB
    for pinnable, is_chosen in ((208 * MIB, True), (207 * MIB, False)):
        candidates = choose(step, beside, replace(gpu, pinnable_bytes=pinnable)).candidates
        assert any(candidate.mode.offloads_inputs for candidate in candidates) == is_chosen
    with_batches = replace(step, batch_bytes=MIB)
    assert choose(with_batches, allowed, replace(gpu, pinnable_bytes=128 * MIB)).chosen is None
    fixed = choose(step, replace(allowed, offloads_inputs=(True,)), replace(gpu, pinnable_bytes=1)).chosen
    assert fixed is not None and fixed.seconds > offloaded.seconds - 1e-6, "the user's own choice is kept"


def test_copies_of_offloaded_inputs_overlap_with_arithmetic() -> None:
    """80 MiB in each pass, during 32 and 96 s of arithmetic."""
    for bus, seconds in ((40 * MIB, 32 + 96), (2 * MIB, 40 + 96)):
        prediction = predict(counted_step(), MemoryMode(recompute_every=1, offloads_inputs=True), make_gpu(0, bus=bus))
        assert prediction.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(("release", "gib"), [("6.6.87.2-microsoft-standard-WSL2", 0.5), ("6.8.0-45-generic", 25.6)])
def test_wsl_pins_half_a_gibibyte_regardless_of_main_memory(
    release: str, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    assert max_pinned_bytes() == pytest.approx(gib * GIB)


def test_fixed_options_give_a_single_candidate() -> None:
    allowed = Allowed(weight_formats=("fp8",), recompute_every=(2,), offloads_inputs=(True,), num_offloaded=4)
    choice = choose(counted_step(), allowed, make_gpu(GIB))
    assert [candidate.mode for candidate in choice.candidates] == [MemoryMode("fp8", 2, True, 4)]


def test_held_gradients_are_added_to_the_memory_of_the_pass() -> None:
    without, held = (predict(counted_step(held=size), MemoryMode(), make_gpu(0)) for size in (0, 5 * MIB))
    assert held.tensor_bytes - without.tensor_bytes == 5 * MIB


def test_a_correction_scales_everything_except_weights() -> None:
    step = counted_step()
    as_counted, more = (predict(step, MemoryMode(), make_gpu(0), factor) for factor in (1.0, 1.25))
    assert more.tensor_bytes - more.weight_bytes == 1.25 * (as_counted.tensor_bytes - as_counted.weight_bytes)


def test_the_weights_of_a_model_are_grouped_by_how_they_can_be_stored() -> None:
    model: MadeUp = model_of(device="meta")
    adapters = bytes_of(model.adapters)
    del model.adapters
    blocks = [*model.attending, *model.widening]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    weights = ModelWeights.of(model, [*layers, model.last], blocks)
    assert adapters > 0 and not any(isinstance(m, Adapter) for m in model.modules())
    uncompressed = StorageCost.of(None)
    assert weights.resident_bytes(uncompressed, ()) == bytes_of(model)
    assert weights.storable == (Matrix.of(model.last.weight),)
    width = model.last.in_features
    sizes = [4 * 4 * width**2] * 6 + [4 * 10 * width**2] * 6
    assert weights.block_bytes(uncompressed) == sizes
    assert weights.resident_bytes(uncompressed, (0, 7, 8)) == bytes_of(model) - sizes[0] - 2 * sizes[7] + 2 * sizes[7]


def test_the_table_marks_the_choice_and_counts_plans_that_do_not_fit() -> None:
    allowed = Allowed(recompute_every=(None, 1), offloads_inputs=(False,), num_offloaded=0)
    choice = choose(counted_step(), allowed, make_gpu(2 * GIB))
    first, recomputed, last = format_table(choice, lambda mode: f"every {mode.recompute_every}")
    assert first.split() == ["options", "GPU", "memory", "free", "tensors", "main", "memory", "batch"]
    assert recomputed.split() == ["->", "every", "1", "1.5", "GiB", "0.5", "GiB", "0.8", "GiB", "128.00", "s"]
    assert last == "too large: 1 other configuration; the smallest needs 3.6 GiB"
    nothing = format_table(choose(counted_step(), allowed, make_gpu(GIB)), lambda mode: f"every {mode.recompute_every}")
    assert [line.split()[:3] for line in nothing[1:]] == [["x", "every", "None"], ["x", "every", "1"]]


def test_the_table_shows_format_errors_and_the_hours_of_a_run() -> None:
    allowed = Allowed(weight_formats=("bf16", "nf4"), recompute_every=(None,), num_offloaded=0)
    choice = choose(counted_step(), allowed, make_gpu(8 * GIB))
    lines = format_table(choice, lambda mode: str(mode.weight_format), num_passes=75)
    assert lines[0].split()[-4:] == ["weight", "error", "batch", "run"]
    cells = {line.replace("->", "").split()[0]: line.split()[-6:] for line in lines[1:]}
    assert cells["bf16"] == ["0.2", "%", "96.00", "s", "2.0", "h"]
    assert cells["nf4"][:2] == ["13.7", "%"]


@pytest.mark.parametrize(
    ("text", "gib"),
    [("12GiB", 12), ("12.0GB", 12), ("7.5 gib", 7.5), ("11500MB", 11500 / 1024), ("0.5g", 0.5), ("300mib", 300 / 1024)],
)
def test_sizes_other_than_whole_gigabytes_are_exact(text: str, gib: float) -> None:
    assert parse_size("--fit", text).free_bytes == gib * GIB


@pytest.mark.parametrize(("text", "reported"), [("24GB", 23.6), ("12", 11.76), ("8g", 7.8), ("16 gb", 15.68)])
def test_a_gpu_name_with_a_size_gives_its_free_memory(
    text: str, reported: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less 0.6 GiB for the desktop; on Windows, which also owns the GPU under WSL2, 1 GiB."""
    size = parse_size("--fit", text)
    for system, kernel, desktop in (("Linux", "6.8.0-45-generic", 0.6), ("Windows", "11", 1.0)):
        monkeypatch.setattr("platform.system", lambda system=system: system)
        monkeypatch.setattr("platform.release", lambda kernel=kernel: kernel)
        assert size.free_bytes / GIB == pytest.approx(reported - desktop)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    assert size.free_bytes / GIB == pytest.approx(reported - 1)


@pytest.mark.parametrize("text", ["", "big", "0GB", "-3GB", "12TB"])
def test_other_words_are_not_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"--fit: .* is not a memory size; use e.g. 12GB"):
        parse_size("--fit", text)


@pytest.mark.parametrize(
    ("text", "words"), [("4090", "'4090' is 4090 GiB"), ("9" * 80, "9' is 1e\\+80 GiB"), ("9" * 400, "9' is inf GiB")]
)
def test_a_gpu_name_without_a_size_is_not_a_size(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"--cards: '?.*{words}, more than any GPU has"):
        parse_size("--cards", text)


def test_a_typical_gpu_has_at_most_the_given_memory() -> None:
    sizes = (6, 8, 11, 11.76, 12, 23.6, 24, 48)
    names = [typical_gpu(MemorySize(int(size * GIB))).name for size in sizes]
    assert names == ["RTX 4060"] * 3 + ["RTX 4070"] * 2 + ["RTX 3090"] * 2 + ["RTX 5090"]
    assert typical_gpu(MemorySize(6 * GIB)).memory_bytes == 6 * GIB
    named = typical_gpu(MemorySize(12 * GIB, names_gpu=True))
    assert named.memory_bytes < 11.2 * GIB and named.nominal_bytes == 12 * GIB


def test_a_device_is_measured() -> None:
    gpu = benchmark_gpu(torch.device("cpu"), GIB, torch.float32, side=128)
    assert gpu.flops > 0 and gpu.bus > 0 and gpu.bandwidth > 0 and gpu.memory_bytes == GIB
    assert 1e-6 < gpu.launch < 1e-3
    work = Work(launches=1000)
    assert work.seconds(replace(gpu, launch=3e-6), 1.0) == pytest.approx(3e-3)


def test_a_gpu_of_any_maker_is_busy_before_it_is_measured_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait takes 0.2 s until it has been busy for half a second, then 1 ms."""
    clock, waited_for = [0.0], []

    def synchronize(device: torch.device) -> None:
        waited_for.append(device)
        clock[0] += 0.2 if clock[0] < measured.BUSY_S else 1e-3

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock[0])
    gpu = benchmark_gpu(torch.device("meta"), GIB, torch.float32, side=128)
    assert gpu.flops == pytest.approx(measured.REACHED * 2 * 128**3 / 1e-3)
    assert gpu.bandwidth == pytest.approx(2 * 4 * 128**2 / 1e-3)
    num_launches = measured.make_small_step(torch.device("meta"), torch.float32)[1]
    assert gpu.launch == pytest.approx(1e-3 / num_launches) and num_launches > 150
    assert set(waited_for) == {torch.device("meta")}


def test_a_stage_encodes_as_many_items_at_a_time_as_fit() -> None:
    """The allocator adds 5 % to temporary memory."""
    stage = StageMemory("encoding images", "vae_batch_size", 100, 40, 20)
    assert [stage.peak(count) for count in (1, 2, 8)] == [142, 163, 289]
    assert [stage.most_that_fits(room) for room in (141, 142, 163, 204, 205, 288, 1000)] == [0, 1, 2, 2, 4, 4, 8]
    assert replace(stage, rise_of_each_more=0).most_that_fits(142) == 8
    assert [replace(stage, most=most).most_that_fits(1000) for most in (1, 2)] == [1, 2]


def test_large_images_are_encoded_one_at_a_time() -> None:
    assert [max_images(side**2) for side in (256, 512, 640, 768, 1024, 2048)] == [8, 4, 2, 1, 1, 1]


@pytest.mark.parametrize("peak", [0, 9 * GIB])
def test_passes_without_gradients_take_time_and_count_if_they_need_more_memory_than_the_step(peak: int) -> None:
    """Forward passes take a third of the 24 blocks' arithmetic of a plain step; copied blocks are copied each time."""
    gpu = replace(make_gpu(0), flops=1e13)
    plain, more = (
        predict(replace(counted_step(), gradientless=passes), MemoryMode(), gpu)
        for passes in (None, GradientlessPasses(21, 43.0, peak))
    )
    assert more.seconds - plain.seconds == pytest.approx(43 * NUM_BLOCKS * BLOCK_FLOPS / 1e13, rel=1e-6)
    assert more.tensor_bytes - plain.tensor_bytes == max(0, peak - NUM_BLOCKS * KEPT)
    slow = replace(gpu, bus=1e6)
    mode = MemoryMode(num_offloaded=2)
    alone, drawn = (
        predict(replace(counted_step(), gradientless=passes), mode, slow)
        for passes in (None, GradientlessPasses(21, 43.0, peak))
    )
    assert drawn.seconds / alone.seconds == pytest.approx(1 + 21 / 2)


# The formulas for the memory of stored weights match the memory that the formats use for storage and decoding.


@pytest.mark.parametrize("shape", [(48, 128), (33, 64), (32, 16, 3, 3)])
@pytest.mark.parametrize("name", CODECS)
def test_a_format_stores_the_bytes_of_its_formula(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(95)
    weight = torch.randn(shape).bfloat16()
    stored = sum(part.numel() * part.element_size() for part in CODECS[name].encode(weight).values())
    assert StorageCost.of(name).num_bytes(Matrix.of(weight)) == stored


@pytest.mark.parametrize("name", CODECS)
def test_decoding_takes_the_declared_number_of_copies(name: str) -> None:
    torch.manual_seed(96)
    layer = nn.Linear(1024, 2048, bias=False).bfloat16().requires_grad_(False)
    matrix = Matrix.of(layer.weight)
    freeze_layer(CODECS[name], layer)
    x = torch.randn(1, 1024).bfloat16().requires_grad_()
    layer(x)  # one-time allocations such as tables
    taken = allocated_peak(lambda: layer(x).sum().backward(), multiplies_bf16=True) / matrix.plain_bytes
    # CPU kernels use workspaces of up to a fifth of this small weight, more with more threads.
    assert taken == pytest.approx(StorageCost.of(name).num_copies, abs=0.25)


@pytest.mark.slow
def test_the_declared_error_of_a_format_matches_a_product_with_outliers() -> None:
    """benchmarks/format_errors.py measures the same product with a larger weight."""
    measured = {name: errors_of(load_format(name).codec, 2048)[2] for name in CODECS}
    for name, value in measured.items():
        declared = load_format(name).error
        assert declared is not None and value == pytest.approx(declared, rel=0.15), name


# The planner's prediction matches the growth of a real process: a U-Net of SD 1.5's size on the CPU.

ROOT = Path(__file__).parents[4]
SHARE = 0.07  # the allocator's rounding and the workspaces of oneDNN, measured: 4 to 6 % in float32


@pytest.mark.nightly
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be measured anew")
@pytest.mark.parametrize(("side", "recomputes"), [(256, 0), (512, 1)])
def test_a_step_of_sd15_grows_the_process_by_the_planned_bytes(side: int, recomputes: int) -> None:
    command = [sys.executable, "-m", "tests.unit.memory.planner.sd15_step", str(side), str(recomputes)]
    # Return freed memory to the system at once: arenas that keep it would count as growth.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=500)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["planned"] == pytest.approx(measured["grown"], rel=SHARE)
