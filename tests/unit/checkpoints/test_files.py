"""Tensor files: damaged files are refused, and files are written completely or not at all."""

import json
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from library.base.atomic_files import atomic_path
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_header, read_metadata
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors

TWO_TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def write_raw(path: Path, header: Any, data: bytes, num_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if num_bytes is None else num_bytes) + text + data)
    return path


def test_a_hand_made_file_is_read_according_to_the_format(tmp_path: Path) -> None:
    values = struct.pack("<6f", 1, 2, 3, 4, 5, 6.5) + struct.pack("<4e", -1, 0.5, 2, 1024)
    path = write_raw(tmp_path / "x.safetensors", {"__metadata__": {"ss_steps": "7"}, **TWO_TENSORS}, values)
    tensors = load_state_dict(path)
    assert tensors["a"].tolist() == [[1, 2, 3], [4, 5, 6.5]]
    assert tensors["b"].dtype == torch.float16 and tensors["b"].tolist() == [-1, 0.5, 2, 1024]
    assert read_metadata(path) == {"ss_steps": "7"}


def test_the_header_is_read_without_the_data(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", TWO_TENSORS, bytes(32))
    header = read_header(path)
    assert header.tensors["b"].shape == (4,) and header.tensors["b"].dtype == "F16"
    assert header.metadata == {} and header.num_bytes == len(json.dumps(TWO_TENSORS))


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": TWO_TENSORS["a"], "b": {**TWO_TENSORS["b"], **changes}}


@pytest.mark.parametrize(
    ("header", "data", "num_bytes", "problem"),
    [
        (TWO_TENSORS, bytes(32), 2**60, "header would be 1152921504606846976 bytes"),
        (TWO_TENSORS, b"", 5000, "truncated: 128 of 5000 header bytes exist"),
        (TWO_TENSORS, bytes(31), None, "'b' ends at byte 32"),
        (TWO_TENSORS, bytes(33), None, "1 bytes follow the last tensor"),
        (b"{nonsense", b"", None, "not valid JSON"),
        (b"[1, 2]", b"", None, "not a JSON object"),
        (entry(data_offsets=[16, 24]), bytes(24), None, "'b' overlaps 'a'"),
        (entry(data_offsets=[28, 36]), bytes(36), None, "gap of 4 bytes before 'b'"),
        (entry(data_offsets=[24, 34]), bytes(34), None, "'b' needs 8 bytes"),
        (entry(data_offsets=[24, -8]), bytes(32), None, "offsets 24 to -8"),
        (entry(shape=[-4]), bytes(32), None, "shape (-4,)"),
        (entry(dtype="F7"), bytes(32), None, "the type F7"),
        ({"a": {"dtype": "F32"}}, b"", None, "lacks dtype, shape or data_offsets"),
        ({"__metadata__": {"k": 3}}, b"", None, "metadata does not map names to strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_refused_with_its_name_and_problem(
    tmp_path: Path, header: Any, data: bytes, num_bytes: int | None, problem: str
) -> None:
    path = write_raw(tmp_path / "broken.safetensors", header, data, num_bytes)
    with pytest.raises(ValueError) as caught:
        load_state_dict(path)
    assert problem in str(caught.value) and "broken.safetensors" in str(caught.value)


def test_a_file_of_three_bytes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"short\.safetensors.*only 3 bytes"):
        read_header(tmp_path / "short.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.safetensors does not exist"):
        load_state_dict(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_pickled_tensors_survive_a_round_trip(tmp_path: Path, extension: str) -> None:
    tensors = {"w": torch.randn(3, 5), "alpha": torch.tensor(2.0)}
    save_pickle_state_dict(tmp_path / f"x.{extension}", tensors)
    loaded = load_state_dict(tmp_path / f"x.{extension}")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_a_state_dict_inside_a_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    weight = torch.randn(2, 2)
    torch.save({"state_dict": {"w": weight}, "global_step": 3}, tmp_path / "model.ckpt")
    assert torch.equal(load_state_dict(tmp_path / "model.ckpt")["w"], weight)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should-not-be-made",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Payload()}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt.*plain tensors"):
        load_state_dict("evil.ckpt")
    assert not Path("should-not-be-made").exists()


def test_errors_about_unreadable_files_are_one_line(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(4000)}, tmp_path / "a.pt")
    content_of_file = (tmp_path / "a.pt").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    for content, message in (
        (b"", "is empty; download or copy it again"),
        (content_of_file[: len(content_of_file) // 2], "it is truncated or damaged ("),
        (pointer, "is a Git LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><html>", "is a web page, not a checkpoint"),
        (b"Entry not found", "is a text file, not a checkpoint; it begins with 'Entry not found'"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(UserError) as error:
            load_state_dict(tmp_path / "a.pt")
        assert message in str(error.value) and "\n" not in str(error.value)
    torch.save({"w": Payload}, tmp_path / "a.pt")
    with pytest.raises(
        UserError, match=r"it contains other Python objects \(tests.unit.checkpoints.test_files.Payload\)"
    ):
        load_state_dict(tmp_path / "a.pt")


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_safetensors(path, {"w": torch.ones(2)}, {"ss_steps": "1"})
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        with atomic_path(path) as temporary:
            temporary.write_bytes(before[:20])
            raise OSError(28, "No space left on device")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_the_temporary_file_is_next_to_the_target_and_keeps_its_extension(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "x.safetensors") as temporary:
        assert temporary.parent == tmp_path / "new" and temporary.suffix == ".safetensors"
        assert not (tmp_path / "new" / "x.safetensors").exists()
        temporary.write_text("done")
    assert (tmp_path / "new" / "x.safetensors").read_text() == "done"


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut may leave the name with an empty file."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, plain=plain: calls.append(name) or plain(*args))
    with atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("done")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_written_file_has_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_safetensors(tmp_path / "x.safetensors", {"w": torch.ones(2)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.safetensors")}
    assert len(modes) == 1


def test_views_are_written_by_value(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6)
    save_safetensors(tmp_path / "x.safetensors", {"t": matrix.t(), "half": matrix.bfloat16()[::2]})
    loaded = load_state_dict(tmp_path / "x.safetensors")
    assert torch.equal(loaded["t"], matrix.t()) and torch.equal(loaded["half"], matrix.bfloat16()[::2])


def test_an_alpha_pickled_as_a_number_is_loaded(tmp_path: Path) -> None:
    torch.save({"a.alpha": 4, "b.alpha": 0.5, "a.lora_up.weight": torch.ones(2, 2), "epoch": 3}, tmp_path / "a.pt")
    tensors = load_state_dict(tmp_path / "a.pt")
    assert tensors.keys() == {"a.alpha", "b.alpha", "a.lora_up.weight"}
    assert (float(tensors["a.alpha"]), float(tensors["b.alpha"])) == (4.0, 0.5)
