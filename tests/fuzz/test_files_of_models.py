"""Values of every type in the JSON of models, adapters, metadata files and journals give an error message, or work."""

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from library.architectures.any_pipeline.folder import PipelineFolder, open_folder
from library.architectures.any_pipeline.measured_models import load_for_measuring
from library.base.errors import UserError
from library.checkpoints.files import PEFT_STEM
from library.checkpoints.headers import read_header
from library.checkpoints.weights import open_sharded
from library.commands.adapter_files import read_adapter
from library.commands.base_models import open_base_model
from library.data.sources.folders.metadata_file import read_metadata
from library.front_ends.journal import MARK, Place, compare_with_journal, read_journal
from library.models.tokenizer_files import read_tokenizer, tokens_for_transformers_4
from library.train_photos.base import recognise
from library.training.evaluation.image_scores import load_score_models
from library.training.reporting.event_stream import log_kind
from library.training.run_queue.jobs import Job
from library.training.saving.run_lock import read_holder
from library.training.sweep.outcomes import read_events
from networks.core.files.adapter_file import PEFT_SETTINGS, read_adapter_file
from tests.fuzz.budget import any_input, works_or_says_why
from tests.tiny.pipelines import build_tiny_pipeline
from tests.tiny.score_models import write_clip, write_dinov2
from tools.make_shards import Journal

LONG = 10**5
VALUES = [
    None, True, False, 0, -1, 7, 10**30, 0.5, 1e300, "", "x", "a/b", "../x", "1", "x" * 3000, [], [[]], [None], ["a"],
    ["a", "b"], ["a", "b", "c"], [1, 2], {}, {"a": 1}, {"a": {"b": None}}, "torch", "os",
]  # fmt: skip
values = st.sampled_from(VALUES)


def load_models(folder: PipelineFolder) -> None:
    for name in folder.used - load_for_measuring(folder).keys():
        folder.load(name, torch.float32)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value inside a JSON value."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return value


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def score_models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scores")
    return [write_dinov2(folder / "dino"), write_clip(folder / "clip")]


def with_file(folder: Path, name: str, data: st.DataObject, action: Callable[[Path], Any]) -> None:
    """Run the action on a folder whose JSON file has one other value, and put the file back."""
    file = folder / name
    text = file.read_text()
    valid = json.loads(text)
    path = data.draw(st.sampled_from(sorted(places(valid), key=str)))
    try:
        file.write_text(json.dumps(with_value(valid, path, data.draw(values))))
        works_or_says_why(lambda: action(folder))
    finally:
        file.write_text(text)


PIPELINE_READERS: dict[str, Callable[[Path], Any]] = {
    "train": lambda folder: open_folder(str(folder), False).build_stage(),
    "load": lambda folder: load_models(open_folder(str(folder), False)),
    "merge": lambda folder: open_base_model("--model", folder),
    "train.py": lambda folder: recognise(str(folder)).title,
}


@pytest.mark.parametrize("reader", PIPELINE_READERS)
@any_input(12)
@given(data=st.data())
def test_any_value_in_model_index(reader: str, pipeline: Path, data: st.DataObject) -> None:
    with_file(pipeline, "model_index.json", data, PIPELINE_READERS[reader])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["train", "load"])
@any_input(25)
@given(data=st.data())
def test_any_value_in_a_configuration_of_a_pipeline(reader: str, pipeline: Path, data: st.DataObject) -> None:
    names = sorted(str(path.relative_to(pipeline)) for path in pipeline.glob("*/*config.json"))
    with_file(pipeline, data.draw(st.sampled_from(names)), data, PIPELINE_READERS[reader])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "hqq", "no such", 3, None])
def test_quantisation_whose_package_is_missing_is_named(method: Any, pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    quantised = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    works_or_says_why(lambda: load_models(open_folder(str(folder), False)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
@any_input(25)
@given(data=st.data())
def test_any_value_in_a_score_model(kind: int, score_models: list[Path], data: st.DataObject) -> None:
    folder = score_models[kind]
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.glob("*.json"))))
    with_file(folder, name, data, lambda folder: load_score_models([str(folder)]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
@any_input(15)
@given(data=st.data())
def test_a_damaged_file_of_a_score_model(kind: int, score_models: list[Path], data: st.DataObject) -> None:
    files = sorted(path for path in score_models[kind].iterdir() if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    try:
        file.write_bytes(content[:start] + data.draw(st.binary(max_size=30)) + content[start + 5 :])
        works_or_says_why(lambda: load_score_models([str(score_models[kind])]))
    finally:
        file.write_bytes(content)


ADAPTER = {
    "lora_unet_x.lora_down.weight": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]},
    "lora_unet_x.lora_up.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [16, 32]},
    "__metadata__": {"ss_network_dim": "4", "ss_network_args": "{}"},
}


@any_input(60)
@given(data=st.data())
def test_any_value_in_the_header_of_an_adapter(tmp_path: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(places(ADAPTER), key=str)))
    text = json.dumps(with_value(ADAPTER, path, data.draw(values))).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
    works_or_says_why(lambda: read_header(file))
    works_or_says_why(lambda: read_adapter_file(file, "--model"))
    works_or_says_why(lambda: read_adapter(file, "--model"))


SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"to_q": 4}}
INDEX = {"metadata": {"total_size": 32}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
TOKENS = {"extra_special_tokens": ["a"], "tokenizer_class": "T5Tokenizer"}
LOG = {"v": 1, "event": "start", "time": 1.0, "options": {"output_name": "a"}}
SHARDS = [{"name": "a", "num_bytes": 1, "digest": "x", "num_pictures": 1, "is_full": True, "inputs": "y"}]


def read_peft(file: Path) -> None:
    """Read a LoRA by PEFT whose settings are in the file."""
    peft = "base_model.model.unet.to_q.lora_{}.weight"
    tensors = {peft.format("A"): torch.ones(4, 8), peft.format("B"): torch.ones(6, 4)}
    save_file(tensors, file.parent / f"{PEFT_STEM}.safetensors")
    read_adapter(file.parent, "--model")


def read_sharded(file: Path) -> None:
    for name in ("m-1", "m-2"):
        save_file({"a" if name == "m-1" else "b": torch.ones(4)}, file.parent / f"{name}.safetensors")
    open_sharded(file)


def read_tokens(file: Path) -> None:
    read_tokenizer(partial(tokens_for_transformers_4, file.parent), file.parent)


READERS: dict[str, tuple[Any, str, Callable[[Path], Any]]] = {
    "adapter_config": (SETTINGS, PEFT_SETTINGS, read_peft),
    "sharded": (INDEX, "model.safetensors.index.json", read_sharded),
    "tokenizer": (
        TOKENS,
        "tokenizer_config.json",
        lambda file: read_tokenizer(partial(tokens_for_transformers_4, file.parent), file.parent),
    ),
    "event log": (LOG, "log.jsonl", lambda file: log_kind({"output_name": "a"}).is_own(file)),
    "outcome": (LOG, "run-events.jsonl", lambda file: read_events(file, 0.0)),
    "shards": (SHARDS, ".a-shards.json", lambda file: Journal(file).read()),
    "lock": ({"process": 1, "host": "a", "since": "b"}, "lock", lambda file: read_holder(file.open())),
    "job": ({}, "1.json", Job.read),
}


@pytest.mark.parametrize("reader", READERS)
def test_any_value_in_a_small_file(reader: str, tmp_path: Path) -> None:
    valid, name, read = READERS[reader]
    file = tmp_path / name
    texts = [json.dumps(with_value(valid, path, value)) for path in places(valid) for value in [*VALUES, {"(a+)+$": 1}]]
    for text in (*texts, "", "[" * LONG, "[" * LONG + "]" * LONG, "1" * LONG, '"\\ud800"', "\0"):
        file.write_text(text)
        works_or_says_why(lambda: read(file))


IMAGES = {"a": {"caption": "a cat", "tags": "cat", "control_path_0": "b.png", "control_path_1": "c.png"}, "b": {}}


@any_input(60)
@given(data=st.data())
def test_any_value_in_a_metadata_file(tmp_path: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(places(IMAGES), key=str)))
    file = tmp_path / "meta.json"
    file.write_text(json.dumps(with_value(IMAGES, path, data.draw(values))))
    works_or_says_why(lambda: list(read_metadata(str(file))))


@pytest.mark.parametrize("digits", ["9" * 5000, "0" * 5000, "1" * 10])
def test_a_reference_with_thousands_of_digits_works_or_is_named(digits: str, tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({"a": {"control_path_0": "x.png", f"control_path_{digits}": "b.png"}}))
    with pytest.raises(UserError, match="name one reference image as control_path, or several"):
        list(read_metadata(str(file)))


JOURNAL = {
    "made_by": "tools/front_end.py", "version": "1", "phase": "installed", "is_whole": True, "displaced": ["a.py"],
    "files": {"b.py": ["0"]}, "head": None, "is_submodule": False, "earlier_update": None,
}  # fmt: skip


def check_journal(place: Place, text: str) -> None:
    place.journal.write_text(text, encoding="utf-8")
    try:
        journal = read_journal(place)
    except UserError:
        return
    assert journal is not None
    compare_with_journal(place, journal)


def test_any_value_in_a_journal(tmp_path: Path) -> None:
    place = Place(tmp_path / "sd-scripts")
    place.folder.mkdir()
    (place.folder / "b.py").write_text("x")
    for path in places(JOURNAL):
        for value in VALUES:
            check_journal(place, json.dumps(with_value(JOURNAL, path, value)))
    for text in (
        "[" * LONG + "]" * LONG,
        MARK + '"files": ' + "[" * LONG,
        "1" * LONG,
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        check_journal(place, text)
