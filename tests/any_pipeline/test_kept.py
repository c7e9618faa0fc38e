"""A measurement is kept by what it depends on, holds what is read, and is believed only if it is what was written."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.any_pipeline.assembly import record_memory
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.kept import (
    NotBelieved,
    drop_unread,
    find_place,
    narrow,
    read_convention,
    write_convention,
)
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.trees import float_tensors
from tests.any_pipeline.test_measured_folder import values_of
from tests.any_pipeline.test_training import SCRIPT, arguments
from tests.running import Finished
from tests.tiny.pipelines import build_tiny_pipeline, watch_pipeline

Train = Callable[..., Finished]
SIZE = (64, 64)


def measured_with_memory(name: str) -> Any:
    watched = watch_pipeline(build_tiny_pipeline(name))
    convention, _ = measure(watched, SIZE)
    return replace(convention, memory=record_memory(watched, convention))


def test_a_kept_convention_is_read_back_and_holds_only_what_is_read(tmp_path: Path) -> None:
    """Qwen-Image reads the last of the hidden states of its language model, and no logits."""
    convention = measured_with_memory("QwenImagePipeline")
    path = tmp_path / "kept.pt"
    write_convention(path, convention, "abc")
    kept = read_convention(path, "abc")
    assert values_of(kept) == values_of(convention)
    assert len(kept.memory) > 1 and kept.memory.keys() == convention.memory.keys()
    for output in kept.memory.values():
        assert output["logits"].numel() == 0
        assert [state.numel() > 0 for state in output["hidden_states"]] == [False, False, True]


def test_values_are_kept_in_the_type_in_which_they_were_computed() -> None:
    values = torch.randn(100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert narrow(values.to(dtype).float()).dtype == dtype
    assert narrow(torch.arange(3)).dtype == torch.int64


def test_a_file_that_is_damaged_or_foreign_is_not_believed(tmp_path: Path) -> None:
    convention = measured_with_memory("AuraFlowPipeline")
    path = tmp_path / "kept.pt"
    write_convention(path, convention, "abc")
    whole = path.read_bytes()
    with pytest.raises(NotBelieved, match="not those that were written"):
        read_convention(path, "another pipeline")
    torch.save({"fingerprint": "abc", "digest": "0" * 32, "convention": convention}, path)
    with pytest.raises(NotBelieved, match="not those that were written"):
        read_convention(path, "abc")
    for data in (b"", b"no pickle", whole[:100], whole[:-100]):
        path.write_bytes(data)
        with pytest.raises(NotBelieved):
            read_convention(path, "abc")
    for value in ({}, [1], torch.zeros(2), {"fingerprint": "abc"}):
        torch.save(value, path)
        with pytest.raises(NotBelieved):
            read_convention(path, "abc")


def test_the_file_is_kept_beside_the_caches_or_below_the_hub_s_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    assert find_place(str(tmp_path / "cache"), "abc") == tmp_path / "cache" / "pipeline_abc.pt"
    assert find_place(None, "abc").is_relative_to(tmp_path / "hub")
    (tmp_path / "file").write_text("")
    write_convention(tmp_path / "file" / "kept.pt", measured_with_memory("AuraFlowPipeline"), "abc")
    assert "the pipeline is measured again at each start" in caplog.text


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "pipeline.py", "a/merges.txt", "a/spiece.model"])
def test_each_file_that_a_measurement_depends_on_changes_the_fingerprint(name: str, tmp_path: Path) -> None:
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(tmp_path)
    folder = open_folder(str(tmp_path), False)
    before = folder.fingerprint()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert folder.fingerprint() != before


def test_unread_outputs_of_text_encoders_are_dropped() -> None:
    memory = {"a": {"states": (torch.ones(2), torch.ones(3)), "count": 3}}
    kept = drop_unread(memory, {("a", ("states", 1))})
    assert [tensor.numel() for tensor in float_tensors(kept)] == [0, 3] and kept["a"]["count"] == 3


@pytest.mark.slow
def test_a_reversed_target_in_the_kept_file_is_measured_again(tmp_path: Path, train: Train) -> None:
    """A file written by this program with wrong contents is found by the comparison at the start."""
    model = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)
    words = arguments(model, tmp_path, "--cache_dir", str(tmp_path / "cache"))
    first = train(words, script=SCRIPT)
    assert first.status == 0, first.stderr
    (place,) = (tmp_path / "cache").glob("pipeline_*.pt")
    fingerprint = open_folder(str(model), False).fingerprint()
    right = read_convention(place, fingerprint)
    second = train(words, script=SCRIPT)
    assert second.status == 0 and "is read from" in second.stderr
    write_convention(place, replace(right, target="latent - noise"), fingerprint)
    third = train(words, script=SCRIPT)
    assert third.status == 0, third.stderr
    assert f"{place} is not used, and AuraFlowPipeline is measured again: what was measured differs" in third.stderr
    assert read_convention(place, fingerprint).target == "noise - latent"
    place.write_bytes(b"damaged")
    fourth = train(words, script=SCRIPT)
    assert fourth.status == 0 and "is measured again" in fourth.stderr
