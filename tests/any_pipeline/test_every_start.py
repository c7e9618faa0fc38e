"""Every start compares what it trains with what the pipeline does; each wrong convention is refused."""

import argparse
import copy
import json
from functools import cache
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.any_pipeline.assembly import find_tokenizer, read_latent_spec, record_memory
from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.conditioning import CapturedText
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.maps import CPU, SizeMaps, read_maps
from library.architectures.any_pipeline.measuring import measure, plain_scheduler
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.start_check import check_denoiser, compare_training
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict, Repeated, build_objective
from library.architectures.any_pipeline.trees import leaves
from library.architectures.any_pipeline.watch import Refused, Watched
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.wrong_conventions import WRONG, Trained
from tests.tiers import first_is_fast
from tests.tiny.more_pipelines import MORE, t5_gemma_config
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


# Rules that single pipelines need hold for any pipeline that needs them.


@cache
def measured(name: str) -> tuple[Watched, Convention, SizeMaps]:
    watched = watch_pipeline(build_tiny_pipeline(name, builder=MORE[name]))
    return watched, *measure(watched, SIZE)


@pytest.mark.parametrize("name", first_is_fast(sorted(MORE)))
def test_the_measured_convention_is_what_the_pipeline_does(name: str) -> None:
    watched, convention, maps = measured(name)
    require_exact(check(watched, convention, maps))


@pytest.mark.slow
def test_a_second_denoiser_for_guidance_needs_no_weights_while_guidance_is_off() -> None:
    watched, convention, _ = measured("Ideogram4Pipeline")
    assert convention.idle == ("unconditional_transformer",)
    assert convention.extra == {"guidance_scale": 1.0, "guidance_schedule": None}
    left = {name: model for name, model in watched.models.items() if name not in convention.idle}
    watched.models, before = left, watched.models
    try:
        assert watched.draw("a cat", SIZE, **convention.extra).decoded
    finally:
        watched.models = before


@pytest.mark.slow
def test_a_pipeline_with_a_list_of_sizes_draws_any_size() -> None:
    watched, convention, _ = measured("Kandinsky5T2IPipeline")
    before = list(watched.pipe.resolutions)
    assert read_maps(watched, convention, (128, 192)).decode.shape[-2:] == (16, 24)
    assert watched.pipe.resolutions == before


def test_an_encoder_is_built_by_the_part_of_its_configuration_that_has_its_sizes(tmp_path: Path) -> None:
    build_tiny_pipeline("PRXPipeline", builder=MORE["PRXPipeline"]).save_pretrained(tmp_path)
    t5_gemma_config().save_pretrained(tmp_path / "text_encoder")
    folder = open_folder(str(tmp_path), False)
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["model_type"] == "t5gemma"
    shapes = {name: tensor.shape for name, tensor in folder.build_empty("text_encoder").state_dict().items()}
    assert shapes == {n: t.shape for n, t in folder.load("text_encoder", torch.float32).state_dict().items()}


def test_a_tokenizer_without_a_limit_counts_captions_where_none_has_one() -> None:
    own, short = object(), SimpleNamespace(model_max_length=77)
    assert find_tokenizer({"tokenizer": own, "text_encoder": None}) == (own, 0)
    assert find_tokenizer({"tokenizer": own, "processor": SimpleNamespace(tokenizer=short)}) == (short, 77)


def test_an_error_of_a_pipeline_is_a_refusal_that_names_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build_tiny_pipeline("AuraFlowPipeline")

    def fail(*_: Any, **__: Any) -> Any:
        return ftfy_that_is_missing.fix_text("a")  # type: ignore[name-defined]  # noqa: F821

    monkeypatch.setattr(type(pipe), "encode_prompt", fail)
    with pytest.raises(Refused, match="it needs the package ftfy-that-is-missing, which is not installed: pip"):
        measure(watch_pipeline(pipe), SIZE)
    # As diffusers imports what may be missing.
    (tmp_path / "drawing.py").write_text("if False:\n    from vision_that_is_missing import transforms\n\n\n"
                                         "def draw(*_, **__):\n    return transforms.resize()\n")  # fmt: skip
    monkeypatch.setattr(type(pipe), "encode_prompt", run_path(str(tmp_path / "drawing.py"))["draw"])
    with pytest.raises(Refused, match="it needs the package vision-that-is-missing, which is not installed"):
        measure(watch_pipeline(pipe), SIZE)


def test_an_error_of_a_pipeline_is_a_refusal_with_the_pipeline_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_tiny_pipeline("AuraFlowPipeline")

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("every prompt must begin with a capital letter")

    monkeypatch.setattr(type(pipe), "encode_prompt", fail)
    with pytest.raises(Refused, match="draws no image of 64x64 from a caption alone: every prompt must begin with a"):
        measure(watch_pipeline(pipe), SIZE)
