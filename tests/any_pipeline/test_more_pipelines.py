"""Rules that single pipelines need hold for any pipeline that needs them."""

import json
from functools import cache
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.architectures.any_pipeline.assembly import find_tokenizer
from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.maps import SizeMaps, read_maps
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.watch import Refused, Watched
from tests.tiers import first_is_fast
from tests.tiny.more_pipelines import MORE, t5_gemma_config
from tests.tiny.pipelines import build_tiny_pipeline, watch_pipeline

SIZE = (64, 64)


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


def test_an_encoder_is_built_by_the_part_of_its_configuration_that_has_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    build_tiny_pipeline("PRXPipeline", builder=MORE["PRXPipeline"]).save_pretrained(tmp_path)
    t5_gemma_config().save_pretrained(tmp_path / "text_encoder")
    # As in a new process, where transformers exchanges its module after diffusers has added the class to the old one.
    monkeypatch.delattr(transformers, "T5GemmaEncoder", raising=False)
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
