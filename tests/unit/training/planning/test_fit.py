"""The log lines about a chosen plan."""

from typing import Any

from library.memory.planner.choice import Allowed, choose
from library.memory.planner.gpus import GIB, Gpu
from library.memory.planner.prediction import CONTEXT_BYTES, OPTIMIZER_STEP, MemoryMode, predict
from library.memory.planner.stages import StageMemory
from library.training.planning.counting import CountedRun
from library.training.planning.fit import Fit, fit_to
from library.training.planning.meta_run import BatchShape
from library.training.planning.previews import CountedPreview
from tests.unit.memory.planner.test_choice import counted_step
from tests.unit.training.test_checks import make_options

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
