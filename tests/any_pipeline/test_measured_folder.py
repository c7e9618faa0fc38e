"""A folder is measured on one block of each list of its denoiser, which gives what the whole denoiser gives."""

import json
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from library.architectures.any_pipeline import measured_models
from library.architectures.any_pipeline.assembly import build, measure_folder
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.folder import PipelineFolder, open_folder
from library.architectures.any_pipeline.measured_models import (
    TextReader,
    load_for_measuring,
    load_shortened,
    load_streamed,
    require_memory,
)
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.targets import block_lists
from library.architectures.any_pipeline.training import PipelinePredict
from library.architectures.any_pipeline.trees import join_values
from library.architectures.any_pipeline.watch import Watched
from library.base.errors import UserError
from library.types import Prompt
from tests.any_pipeline.test_convention import SIZE, measured
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

pytestmark = pytest.mark.slow


def values_of(convention: Convention) -> dict[str, Any]:
    values = {f.name: getattr(convention, f.name) for f in fields(convention)}
    for name in ("takes_batches", "pads", "output", "memory"):  # compared by other tests
        del values[name]
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_one_block_of_each_list_gives_the_convention_of_all(name: str, tmp_path: Path) -> None:
    pipe = build_tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    of_few = measure_folder(folder, folder.build_stage(), "no")
    of_all, _ = measure(watch_pipeline(pipe), SIZE)
    assert values_of(of_few) == values_of(of_all)


def test_a_denoiser_is_shortened_to_the_first_block_of_each_list(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline("AuraFlowPipeline")
    pipe.save_pretrained(tmp_path / "model")
    short: Any = load_shortened(open_folder(str(tmp_path / "model"), False), "transformer")
    whole = pipe.transformer.single_transformer_blocks
    assert len(whole) == 4 and len(short.single_transformer_blocks) == 1
    pairs = zip(short.single_transformer_blocks[0].parameters(), whole[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_streamed_denoiser_holds_one_block_at_a_time_and_gives_the_same(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    pipe = build_tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    _, convention, maps = measured(name)
    streamed: Any = load_streamed(open_folder(str(tmp_path / "model"), False), convention.denoiser)
    blocks = [block for blocks in block_lists(streamed) for block in blocks]
    in_memory = []

    def count(*_: Any) -> None:
        in_memory.append(sum(not next(block.parameters()).is_meta for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(count)
    with torch.no_grad():
        outputs = [join_values(model(**maps.kwargs)) for model in (streamed, pipe.transformer)]
    assert torch.equal(*outputs)
    assert in_memory == [1] * len(blocks) and len(blocks) == 6
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())


def note_loads(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[int]]:
    """Return, filled by what loads, the models that are loaded and how many text encoders are in memory before each.
    None are so small that they stay there together."""
    most, loaded, load = [0], set[str](), PipelineFolder.load

    def note(self: PipelineFolder, name: str, dtype: torch.dtype) -> Any:
        model = load(self, name, dtype)
        loaded.add(name)
        most.append(len(watched.models.keys() & {"text_encoder", "text_encoder_2"}))
        return model

    monkeypatch.setattr(PipelineFolder, "load", note)
    monkeypatch.setattr(measured_models, "MOST_TEXT_BYTES", 0)
    return loaded, most


def test_large_text_encoders_are_in_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    watched = folder.build_stage()
    loaded, most = note_loads(watched, monkeypatch)
    one_by_one = measure_folder(folder, watched, "no")
    assert max(most) == 0 and loaded >= {"text_encoder", "text_encoder_2"}  # beside the one that is loaded
    monkeypatch.undo()
    assert values_of(one_by_one) == values_of(measure_folder(folder, folder.build_stage(), "no"))


def test_a_preview_loads_large_text_encoders_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    words = {"pretrained_model_name_or_path": str(tmp_path / "model")}
    architecture = build(PipelineOptions.from_args(Namespace(**{**PipelineOptions.defaults(), **words})))
    assert isinstance(architecture.predict, PipelinePredict) and architecture.preview is not None
    denoiser, draw = architecture.load.denoiser(), architecture.preview.draw
    loaded, most = note_loads(architecture.predict.watched, monkeypatch)
    prompt = Prompt("a red bird", "", 64, 64, 1, 2, 1.0, None, None, None, None, None)
    assert draw is not None and draw(denoiser, prompt, torch.Generator().manual_seed(1), lambda: True) is not None
    assert max(most) == 0 and loaded == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("most", [0, 1 << 40])
def test_the_main_memory_of_a_measurement_is_counted_before_weights_are_read(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the models take that are in memory together."""
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    watched, texts = folder.build_stage(), TextReader.build(folder, "no")
    monkeypatch.setattr(measured_models, "MOST_TEXT_BYTES", most)
    counted = require_memory(folder, texts)
    watched.models = load_for_measuring(folder)
    in_memory = []
    for name in texts.names:
        texts.load(watched, name)
        in_memory.append(sum(p.numel() * p.element_size() for m in watched.models.values() for p in m.parameters()))
    assert counted == pytest.approx(max(in_memory), rel=0.01)
    free = SimpleNamespace(available=counted - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(UserError, match=r"measuring FluxPipeline takes .* of main memory, and .* are free"):
        require_memory(folder, texts)


def test_a_quantised_denoiser_is_named(tmp_path: Path) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **packed}))
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    with pytest.raises(UserError, match=r"its transformer is quantised \(bitsandbytes\).*use the model in bf16"):
        measure_folder(folder, folder.build_stage(), "no")


def test_a_measurement_reads_text_encoders_when_they_are_called(tmp_path: Path) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    assert load_for_measuring(open_folder(str(tmp_path / "model"), False)).keys() == {"transformer", "vae"}


def test_a_folder_of_half_precision_files_alone_is_measured(tmp_path: Path) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model", variant="fp16")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    assert measure_folder(folder, folder.build_stage(), "no").denoiser == "transformer"


def test_a_folder_without_one_of_several_text_encoders_is_measured(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline("StableDiffusion3Pipeline")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    assert "text_encoder_2" in folder.used and "text_encoder_3" not in folder.used
    assert measure_folder(folder, folder.build_stage(), "no").denoiser == "transformer"
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"transformers",\n    "CLIPTextModelWithProjection"', "null, null"))
    with pytest.raises(UserError, match="lacks text_encoder"):
        open_folder(str(tmp_path / "model"), trusts_code=False).build_stage()
