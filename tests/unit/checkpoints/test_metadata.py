"""Metadata, hashes and marks of files."""

import argparse
import hashlib
import importlib
import json
import logging
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sha256_of_file, sshs_hashes, webui_hash, with_hashes
from library.checkpoints.headers import LENGTH_BYTES, read_header
from library.checkpoints.marks import MARK_FIELD, mark_folder, mark_of, read_mark, save_image, seal_text
from library.checkpoints.metadata import RunSummary, training_metadata
from library.checkpoints.overwriting import check_target, find_place, judge, known_by_start, marked, sealed
from library.checkpoints.saving import save_pickle_state_dict, save_safetensors
from tests.running import SCRIPTS

FACTS = RunSummary(
    session_id=1,
    started_at=2.0,
    seed=3,
    num_train_images=4,
    num_validation_images=0,
    num_reg_images=0,
    num_batches_per_epoch=4,
    num_epochs=1,
    max_train_steps=4,
    optimizer="torch.optim.adamw.AdamW",
    has_relative_step=False,
    network_args={},
    datasets={},
    run_digest="0123",
)


def metadata_of(script: str, arguments: str) -> Mapping[str, str]:
    """Return the training metadata of `script` for command-line `arguments`."""
    options_type = SCRIPTS[script].options
    parser = argparse.ArgumentParser()
    options_type.add_to(parser)
    options = options_type.from_args(parser.parse_args(arguments.split()))
    recipe = vars(importlib.import_module(SCRIPTS[script].build.__module__)).get("RECIPE")  # SD has none
    return training_metadata(options, {} if recipe is None else recipe.describe(options), FACTS)


@pytest.mark.parametrize(
    ("script", "rates", "value"),
    [
        ("train_network", "5e-5", "5e-05"),
        ("sdxl_train_network", "5e-5", "5e-05"),
        ("sdxl_train_network", "5e-5 1e-5", "[5e-05, 1e-05]"),
        ("flux_train_network", "5e-5", "[5e-05]"),
        ("flux_train_network", "5e-5 1e-5", "[5e-05, 1e-05]"),
        ("sd3_train_network", "5e-5 1e-5 0", "[5e-05, 1e-05, 0.0]"),
        ("lumina_train_network", "5e-5", "[5e-05]"),
        ("anima_train_network", "5e-5", "[5e-05]"),
        ("hunyuan_image_train_network", "5e-5", "[5e-05]"),
    ],
)
def test_all_text_encoder_learning_rates_are_recorded(script: str, rates: str, value: str) -> None:
    assert metadata_of(script, f"--text_encoder_lr {rates}")["ss_text_encoder_lr"] == value


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_an_unset_text_encoder_learning_rate_is_recorded_as_none(script: str) -> None:
    assert metadata_of(script, "--learning_rate 1e-4")["ss_text_encoder_lr"] == "None"


# Hashes, compared with those of hand-built file contents.

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def build_file_content(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, bytes]:
    """Build a safetensors file as (length and header, data), sorted by falling dtype size, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for name in order:
        raw = bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": offsets,
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, data


def tensors_of_several_dtypes() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {
        "b.weight": torch.randn(3, 4),
        "a.weight": torch.randn(5).bfloat16(),
        "z.alpha": torch.tensor([4]),
        "a.scale": torch.randn(2),
    }


def test_the_model_hash_covers_the_data_in_file_order() -> None:
    tensors = tensors_of_several_dtypes()
    assert sshs_hashes(tensors, {})[0] == hashlib.sha256(build_file_content(tensors, {})[1]).hexdigest()


def test_the_model_hash_matches_the_data_of_the_written_file(tmp_path: Path) -> None:
    tensors = tensors_of_several_dtypes()
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors, with_hashes(tensors, {"ss_steps": "3", "modelspec.title": "x"}))
    header = read_header(path)
    data = path.read_bytes()[LENGTH_BYTES + header.num_bytes :]
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_the_legacy_hash_covers_64_kib_at_1_mib_of_a_file_with_only_ss_keys() -> None:
    torch.manual_seed(6)
    tensors = {"w": torch.randn(600, 512)}
    head, data = build_file_content(tensors, {"ss_steps": "3"})
    expected = hashlib.sha256((head + data)[1048576 : 1048576 + 65536]).hexdigest()[:8]
    metadata = {"ss_steps": "3", "modelspec.title": "left out", "sshs_x": "too"}
    assert sshs_hashes(tensors, metadata)[1] == expected


def test_the_legacy_hash_of_a_file_below_1_mib_is_the_hash_of_empty_data() -> None:
    assert sshs_hashes(tensors_of_several_dtypes(), {"ss_steps": "3"})[1] == "e3b0c442"


def test_old_hashes_in_metadata_are_replaced() -> None:
    tensors = tensors_of_several_dtypes()
    fresh = with_hashes(tensors, {"ss_steps": "3"})
    assert with_hashes(tensors, {"ss_steps": "3", "sshs_model_hash": "old", "sshs_legacy_hash": "old"}) == fresh


def test_the_webui_hash_covers_64_kib_at_1_mib(tmp_path: Path) -> None:
    content = bytes(i * 7 % 251 for i in range(1048576 + 70000))
    (tmp_path / "model.ckpt").write_bytes(content)
    assert webui_hash(tmp_path / "model.ckpt") == hashlib.sha256(content[1048576 : 1048576 + 65536]).hexdigest()[:8]
    assert sha256_of_file(tmp_path / "model.ckpt") == hashlib.sha256(content).hexdigest()


def test_the_hashes_of_a_missing_file_and_a_folder_are_placeholders(tmp_path: Path) -> None:
    assert (webui_hash(tmp_path / "no.ckpt"), sha256_of_file(tmp_path / "no.ckpt")) == ("NOFILE", "NOFILE")
    assert (webui_hash(tmp_path), sha256_of_file(tmp_path)) == ("IsADirectory", "IsADirectory")


# The mark of a command in every kind of file, and what may be replaced.

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
