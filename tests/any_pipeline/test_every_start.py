"""Every start compares what it trains with what the pipeline does; each wrong convention is refused."""

import argparse
import copy
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
from library.architectures.any_pipeline.start_check import check_denoiser, compare_training
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict, Repeated, build_objective
from library.architectures.any_pipeline.trees import leaves
from library.architectures.any_pipeline.watch import Refused, Watched
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.wrong_conventions import WRONG, Trained
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

SIZE = (64, 64)
OPTIONS = PipelineOptions.from_args(argparse.Namespace(**PipelineOptions.defaults()))


def build(name: str) -> Any:
    return build_published(find_model(name), name) if name == "WanPipeline" else build_tiny_pipeline(name)


@cache
def trained(name: str) -> tuple[nn.Module, Trained]:
    """Return the denoiser and what a later start trains with: no model is in memory, only recorded outputs."""
    pipe = build(name)
    watched = watch_pipeline(pipe)
    convention, maps = measure(watched, SIZE)
    require_exact(check(watched, convention, maps))
    memory, denoiser = record_memory(watched, convention), watched.models[convention.denoiser]
    later: Watched = watch_pipeline(copy.copy(pipe))
    later.models, later.memory, later.denoiser, later.idle = {}, memory, convention.denoiser, convention.idle
    if convention.replaces_scheduler:
        later.set_scheduler(plain_scheduler(later.pipe.scheduler))
    example = {path: leaves(maps.kwargs)[path] for path in convention.text}
    text = CapturedText(later, convention, (), example, None, 0, torch.float32)
    predict = PipelinePredict(later, convention, text)
    codec = PipelineLatents(read_latent_spec(convention), convention)
    return denoiser, Trained(predict, codec, build_objective(OPTIONS, predict))


def require_right(part: Trained) -> None:
    require_exact(compare_training(part.predict, part.codec, part.objective))


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_what_was_measured_is_right_at_a_later_start_without_models(name: str) -> None:
    require_right(trained(name)[1])


@pytest.mark.parametrize("wrong", first_is_fast(sorted(WRONG)))
def test_a_wrong_convention_is_refused_at_every_start(wrong: str) -> None:
    """A measurement makes the same comparison, so what a later start refuses is refused then, too."""
    name, change = WRONG[wrong]
    part = trained(name)[1]
    require_right(part)
    with pytest.raises(Refused):
        require_right(change(part))


def test_the_denoiser_is_called_once_for_each_new_size() -> None:
    denoiser, part = trained("FluxPipeline")
    passes, state = list[int](), torch.random.get_rng_state()
    hook = denoiser.register_forward_hook(lambda *_: passes.append(1))
    try:
        check_denoiser(part.predict, Repeated(denoiser, 1), part.predict.prepare((64, 192), CPU), (64, 192))
    finally:
        hook.remove()
    assert len(passes) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_too_little_memory_for_the_check_is_no_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser, part = trained("FluxPipeline")

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
