"""Every start compares what it trains with what the pipeline does; each wrong convention is refused."""

import argparse
import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.any_pipeline.assembly import read_latent_spec, record_memory
from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.conditioning import CapturedText
from library.architectures.any_pipeline.maps import CPU
from library.architectures.any_pipeline.measuring import measure, plain_scheduler
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.start_check import check_denoiser, compare_training, leaf_error
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict, Repeated, build_objective
from library.architectures.any_pipeline.trees import leaves
from library.architectures.any_pipeline.watch import Refused, Watched, setting
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.wrong_conventions import WRONG, Trained, of_convention
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

SIZE = (64, 64)
OPTIONS = PipelineOptions.from_args(argparse.Namespace(**PipelineOptions.defaults()))


def build(name: str) -> Any:
    return build_published(find_model(name), name) if name == "WanPipeline" else build_tiny_pipeline(name)


@cache
def trained(name: str) -> tuple[nn.Module, Trained, Trained]:
    """Return the denoiser, and what a later start and the start that measures train with: no model is in memory, only
    recorded outputs. Both are right."""
    parts = prepare(build(name))
    for part in parts[1:]:
        require_right(part)
    return parts


def prepare(pipe: Any) -> tuple[nn.Module, Trained, Trained]:
    watched = watch_pipeline(pipe)
    convention, maps = measure(watched, SIZE)
    require_exact(check(watched, convention, maps))
    memory, denoiser = record_memory(watched, convention), watched.models[convention.denoiser]
    watched.models = {}
    later: Watched = watch_pipeline(copy.copy(pipe))
    later.models, later.memory, later.denoiser, later.idle = {}, memory, convention.denoiser, convention.idle
    if convention.replaces_scheduler:
        later.set_scheduler(plain_scheduler(later.pipe.scheduler))
    example = {path: leaves(maps.kwargs)[path] for path in convention.text}

    def build_training(watched: Watched) -> Trained:
        text = CapturedText(watched, convention, (), example, None, 0, torch.float32)
        predict = PipelinePredict(watched, convention, text)
        codec = PipelineLatents(read_latent_spec(convention), convention)
        return Trained(predict, codec, build_objective(OPTIONS, predict))

    return denoiser, build_training(later), build_training(watched)


def require_right(part: Trained) -> None:
    require_exact(compare_training(part.predict, part.codec, part.objective))


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_what_was_measured_is_right_at_a_later_start_without_models(name: str) -> None:
    trained(name)


@pytest.mark.parametrize("wrong", first_is_fast(sorted(WRONG)))
def test_a_wrong_convention_is_refused_at_every_start(wrong: str) -> None:
    """Also at the one that measures."""
    name, change = WRONG[wrong]
    for part in trained(name)[1:]:
        with pytest.raises(Refused):
            require_right(change(part))


def test_the_denoiser_is_called_once_for_each_new_size() -> None:
    denoiser, part, _ = trained("FluxPipeline")
    passes, state = list[int](), torch.random.get_rng_state()
    hook = denoiser.register_forward_hook(lambda *_: passes.append(1))
    try:
        check_denoiser(part.predict, Repeated(denoiser, 1), part.predict.prepare((64, 192), CPU), (64, 192))
    finally:
        hook.remove()
    assert len(passes) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_models_that_are_wrongly_called_without_effect_are_refused() -> None:
    _, part, _ = trained("FluxPipeline")
    wrong = of_convention(lambda c: replace(c, idle=("text_encoder",)))(part)
    with setting(part.predict.watched, idle=("text_encoder",)), pytest.raises(Refused, match="models without effect"):
        require_right(wrong)


def test_both_parts_of_complex_arguments_are_compared() -> None:
    angles = torch.polar(torch.ones(3), torch.tensor([0.1, 0.2, 0.3]))
    assert leaf_error(angles, angles) == 0 and leaf_error(angles.conj().resolve_conj(), angles) > 0.5


def check_first_size(name: str, *, pads: bool = False, count: int = 2, change: Any = None) -> int:
    """Check a denoiser as at the first size of a run, `change`d by a hook, and return how often it ran."""
    denoiser, part, _ = trained(name)
    part = of_convention(lambda c: replace(c, takes_batches=True, pads=pads))(part)
    passes = list[int]()
    hooks = [denoiser.register_forward_hook(lambda *_: passes.append(1))]
    hooks += [] if change is None else [denoiser.register_forward_hook(change)]
    try:
        check_denoiser(part.predict, Repeated(denoiser, count), part.predict.prepare(SIZE, CPU), SIZE)
    finally:
        for hook in hooks:
            hook.remove()
    return len(passes)


def test_a_denoiser_that_takes_batches_is_called_three_times_at_the_first_size() -> None:
    assert check_first_size("FluxPipeline") == 3 and check_first_size("FluxPipeline", count=1) == 1
    assert check_first_size("LuminaPipeline", pads=True, count=3) == 3


def test_samples_that_reach_one_another_in_a_batch_are_refused() -> None:
    def mix(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + 0.1 * output[0].mean(0, keepdim=True),)

    with pytest.raises(Refused, match="in a batch of 2 the loaded denoiser gives a sample another"):
        check_first_size("FluxPipeline", change=mix)


def test_captions_that_are_wrongly_padded_are_refused_unless_adapters_are_random() -> None:
    with pytest.raises(Refused, match="in a batch of 2"):
        check_first_size("QwenImagePipeline", pads=True)

    def drop(_: Any, __: Any, output: Any) -> Any:
        return (output[0] + 1e-3 * torch.randn(len(output[0]), 1, 1),)

    assert check_first_size("QwenImagePipeline", pads=True, change=drop) == 4


def test_too_little_memory_for_the_check_is_no_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser, part, _ = trained("FluxPipeline")

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(denoiser), "forward", fail)
    check_denoiser(part.predict, Repeated(denoiser, 1), part.predict.prepare(SIZE, CPU), SIZE)
    assert "too little memory to compare images of 64x64 with the pipeline" in caplog.text


def test_tallest_and_widest_images_are_checked_before_the_first_step() -> None:
    part = trained("FluxPipeline")[1]
    part.predict.expect_sizes([(64, 64), (128, 64), (64, 192), (128, 128)])
    assert part.predict.expected == [(192, 64), (64, 128)]
    part.predict.expect_sizes([])
    assert part.predict.expected == []
