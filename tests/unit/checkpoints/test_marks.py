"""The mark of a command in every kind of file, and what may be replaced."""

import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.checkpoints.files import load_state_dict, save_pickle_state_dict, save_safetensors
from library.checkpoints.marks import MARK_FIELD, mark_folder, mark_of, read_mark, save_image
from library.checkpoints.overwriting import find_place, judge, known_by_start, marked

TENSORS = {"a": torch.arange(3.0)}


def write_tar(path: Path, mark: str) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={MARK_FIELD: mark}) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def write_folder(path: Path, mark: str) -> None:
    path.mkdir()
    (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    mark_folder(path, mark)


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "a.png": lambda path, mark: save_image(path, Image.new("RGB", (4, 4)), mark, {"parameters": "ein Täßchen 日"}),
    "a.jpg": lambda path, mark: save_image(path, Image.new("RGB", (4, 4)), mark),
    "a.safetensors": lambda path, mark: save_safetensors(path, TENSORS, {MARK_FIELD: "of the input"}, mark),
    "a.ckpt": lambda path, mark: save_pickle_state_dict(path, TENSORS, {"epoch": 3}, mark),
    "a.tar": write_tar,
    "a": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_mark_is_read_back_and_covers_the_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = marked("a file of mine", mark_of("tools/x.py", path), is_folder=name == "a")
    assert judge(path, kind) == "free"
    WRITERS[name](path, mark_of("tools/x.py", path))
    assert read_mark(path) == f"tools/x.py: {name}" and judge(path, kind) == "ours"
    renamed = path.rename(tmp_path / f"b{path.suffix}")
    other = marked("a file of mine", mark_of("tools/x.py", renamed), is_folder=name == "a")
    assert judge(renamed, other) == "foreign"


def test_marks_leave_the_content_readable(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.ckpt", "a.png"):
        WRITERS[name](tmp_path / name, "tools/x.py: a")
    for name in ("a.safetensors", "a.ckpt"):
        assert torch.equal(load_state_dict(tmp_path / name)["a"], TENSORS["a"])
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["epoch"] == 3
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == "ein Täßchen 日"


def test_a_folder_with_another_file_is_foreign(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", "tools/x.py: a")
    (tmp_path / "a" / "photo.png").touch()
    assert judge(tmp_path / "a", marked("a model", "tools/x.py: a", is_folder=True)) == "foreign"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\xff\xd8\xff", b"{", b"\0" * 600, b"x"])
def test_damaged_files_have_no_mark(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    assert read_mark(tmp_path / "a.safetensors") is None


def test_nothing_is_lost_in_empty_and_special_files(tmp_path: Path) -> None:
    kind = known_by_start("a log", lambda start: start == b"log")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "log").write_bytes(b"log")
    (tmp_path / "text").write_bytes(b"text")
    standings = {path.name: judge(path, kind) for path in tmp_path.iterdir()}
    assert standings == {"empty": "free", "folder": "foreign", "pipe": "free", "log": "ours", "text": "foreign"}


def test_a_save_beside_a_foreign_file_replaces_only_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = known_by_start("a log", lambda start: start == b"log")
    path = tmp_path / "a.txt"
    assert find_place(path, kind) == path and not caplog.text
    path.write_text("mine")
    (tmp_path / "a-rescued.txt").write_text("mine too")
    (tmp_path / "a-rescued-2.txt").write_text("log")
    with caplog.at_level(logging.WARNING):
        assert find_place(path, kind) == (place := tmp_path / "a-rescued-2.txt")
    assert f"{path} is a text file, not a log, and is kept; saving {place} instead" in caplog.text
