"""The mark of a command in every kind of file, and what may be replaced."""

import logging
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file

from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.marks import MARK_FIELD, mark_folder, mark_of, read_mark, save_image, seal_text
from library.checkpoints.overwriting import check_target, find_place, judge, known_by_start, marked, sealed
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors

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


def change_pixel(path: Path) -> None:
    """Change a pixel as an editor that keeps the metadata would."""
    with Image.open(path) as image:
        info = image.info
        edited = image.convert("RGB")
    edited.putpixel((0, 0), (255, 0, 0))
    if path.suffix == ".png":
        save_png(path, edited, info)
    else:
        edited.save(path, comment=info["comment"])


def save_png(path: Path, image: Image.Image, info: dict[str, str]) -> None:
    texts = PngInfo()
    for name, text in info.items():
        texts.add_itxt(name, text)
    image.save(path, pnginfo=texts)


def change_safetensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"a": TENSORS["a"] + 1}, path, metadata)


def change_pickle(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    torch.save({"a": TENSORS["a"] + 1}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment


def change_index(path: Path) -> None:
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "Flux2Pipeline"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "a.png": change_pixel,
    "a.jpg": change_pixel,
    "a.safetensors": change_safetensors,
    "a.ckpt": change_pickle,
    "a": change_index,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_whose_content_was_changed_is_foreign(tmp_path: Path, name: str) -> None:
    path, mark = tmp_path / name, mark_of("tools/x.py", tmp_path / name)
    WRITERS[name](path, mark)
    CHANGES[name](path)
    kind = marked("a file of mine", mark, is_folder=path.is_dir())
    assert read_mark(path) == mark and judge(path, kind) == "foreign"
    with pytest.raises(UserError, match=r"tools/x.py: a\S*, changed since\), not a file of mine: it"):
        check_target("--out", path, kind)


def test_a_weight_file_that_was_changed_in_a_folder_makes_it_foreign(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.mkdir()
    (path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    save_safetensors(path / "unet.safetensors", TENSORS)
    mark_folder(path, "tools/x.py: a")
    kind = marked("a model", "tools/x.py: a", is_folder=True)
    assert judge(path, kind) == "ours"
    save_safetensors(path / "unet.safetensors", {"a": TENSORS["a"] + 1})
    assert judge(path, kind) == "foreign"


def test_metadata_are_no_content_and_marks_without_a_digest_count(tmp_path: Path) -> None:
    png, weights = tmp_path / "a.png", tmp_path / "a.safetensors"
    WRITERS["a.png"](png, "tools/x.py: a.png")
    with Image.open(png) as image:
        save_png(png, image.copy(), {**image.info, "title": "mine"})
    assert judge(png, marked("", "tools/x.py: a.png")) == "ours"
    save_png(png, Image.new("RGB", (4, 4), "red"), {MARK_FIELD: "tools/x.py: a.png"})
    save_file(TENSORS, weights, {MARK_FIELD: "tools/x.py: a.safetensors"})
    for path in (png, weights):
        assert judge(path, marked("", f"tools/x.py: {path.name}")) == "ours"


def test_a_sealed_text_is_own_until_it_is_edited(tmp_path: Path) -> None:
    path, kind = tmp_path / "a b.toml", sealed("a file of mine", "# mine")
    for content, standing in (
        (seal_text("# mine", "a = 1\n"), "ours"),
        ("# mine\na = 1\n", "ours"),  # of an earlier version
        (seal_text("# mine", "a = 1\n") + "b = 2\n", "foreign"),
        (seal_text("# mine too", "a = 1\n"), "foreign"),
        ("a = 1\n", "foreign"),
    ):
        path.write_text(content, newline="\n")
        assert judge(path, kind) == standing, content


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
