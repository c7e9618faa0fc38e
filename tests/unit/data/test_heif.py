"""HEIC and AVIF are read wherever images are, and a missing plug-in of Pillow is named."""

import io
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pillow_heif.HeifImagePlugin  # noqa: F401  # registers the format for saving
import pytest
from PIL import Image, ImageOps

from library.base.errors import UserError
from library.data.decoding.images import ORIENTATION, read_pixels, read_size
from library.data.description import image_extensions
from library.data.description.image_extensions import plugin_for
from library.data.plan.audit_pixels import read_grey
from library.data.sources.folders.reading import read_image_size
from library.environment.requirements import quote
from tests.unit.data.builders import SPEC, batches_of, plan_of, write_config
from tests.unit.data.shard_builders import write_tar
from tools import captions_to_metadata, resize_images

FORMATS = {"heic": "HEIF", "HEIC": "HEIF", "heif": "HEIF", "avif": "AVIF", "jpg": "HEIF"}
EXACT = {"HEIF": {"quality": -1, "chroma": 444}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
MISSING = f"pillow-heif ({quote(sys.executable)} -m pip install pillow-heif)"


def quarters(size: tuple[int, int] = (128, 64)) -> Image.Image:
    """Return an image with a different colour in each quarter."""
    small = np.array([[[250, 250, 250], [250, 20, 20]], [[20, 250, 20], [20, 20, 250]]], dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.NEAREST)


def encode(ending: str, image: Image.Image, orientation: int = 1) -> bytes:
    target, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(target, FORMATS[ending], exif=exif.tobytes(), **EXACT[FORMATS[ending]])
    return target.getvalue()


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("ending", FORMATS)
def test_images_of_phones_are_read_upright(tmp_path: Path, ending: str, orientation: int) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(encode(ending, quarters(), orientation))
    turned = quarters()
    turned.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned)).astype(int)
    rgb, alpha = read_pixels(str(path))
    assert alpha is None and np.abs(rgb - expected).mean() < 4
    size = (expected.shape[1], expected.shape[0])
    assert read_size(str(path)) == read_image_size(str(path))[1] == size
    assert read_grey(str(path), size)[0].size == size


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write a folder of captioned photos in every format."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, ending in enumerate(FORMATS):
        (folder / f"{number}.{ending}").write_bytes(encode(ending, quarters(), 6))
        (folder / f"{number}.txt").write_text(f"photo {number}")
    return folder


SUBSET = "[[datasets]]\nresolution = [128, 64]\nenable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\n"
SUBSET += "[[datasets.subsets]]\ncaption_extension = '.txt'\n"


def test_a_dataset_of_photos_trains_from_folders_controls_and_shards(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "controls")
    members = [(path.name.lower(), path.read_bytes()) for path in sorted(photos.iterdir())]
    write_tar(tmp_path / "0.tar", members)
    folder = plan_of(write_config(tmp_path / "a.toml", SUBSET + "image_dir = '{here}/photos'"))
    shards = plan_of(write_config(tmp_path / "b.toml", SUBSET + "shards = '{here}/0.tar'"))
    controls = SUBSET + "image_dir = '{here}/photos'\ncontrol_dirs = ['{here}/controls']"
    pairs = plan_of(write_config(tmp_path / "c.toml", controls), spec=replace(SPEC, max_references=1))
    first, packed, paired = (batches_of(plan) for plan in (folder, shards, pairs))
    assert len(first) == len(packed) == len(paired) == len(FORMATS)
    for a, b, c in zip(first, packed, paired, strict=True):
        assert a.pixels_BCHW is not None and b.pixels_BCHW is not None
        assert a.captions == b.captions and a.pixels_BCHW.equal(b.pixels_BCHW)
        assert a.pixels_BCHW.shape[2] > a.pixels_BCHW.shape[3]  # turned upright
        assert c.reference_pixels[0].shape[2] > c.reference_pixels[0].shape[3]


def test_commands_find_photos(photos: Path, tmp_path: Path) -> None:
    arguments = [str(photos), str(tmp_path / "meta.json"), "--full_path", "--caption_extension", ".txt"]
    assert captions_to_metadata.main(arguments) == 0
    assert resize_images.main([str(photos), str(tmp_path / "small"), "--max_resolution", "32x32"]) == 0
    assert len(list((tmp_path / "small").glob("*.jpg"))) == len(FORMATS)


# --- without the plug-in ---


@pytest.fixture
def without_heif(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_heif(monkeypatch)


def forget_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Pillow read no HEIF, as without the package."""
    Image.init()
    monkeypatch.setattr(Image, "EXTENSION", {key: kind for key, kind in Image.EXTENSION.items() if kind != "HEIF"})
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert plugin_for("a.heic") is image_extensions.HEIF


def test_the_audit_names_the_package_and_does_not_advise_to_rename(
    photos: Path, tmp_path: Path, without_heif: None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("4.jpg", "4.txt"):
        (photos / name).unlink()
    (photos / "old.gif").write_bytes(b"x")
    plan_of(write_config(tmp_path / "a.toml", SUBSET + "image_dir = '{here}/photos'")).audit(logging.getLogger("audit"))
    lines = [record.getMessage() for record in caplog.records]
    assert any(f"3 images are left out: they require {MISSING}: 0.heic, 1.HEIC, 2.heif" in line for line in lines)
    assert any(
        "1 images have unsupported extensions; convert or rename them to .png or .jpg: old.gif" in line
        for line in lines
    )


def test_an_index_of_shards_notices_that_the_package_was_installed(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "0.tar", [(path.name.lower(), path.read_bytes()) for path in sorted(photos.iterdir())])
    options = write_config(tmp_path / "a.toml", SUBSET + "shards = '{here}/0.tar'")
    with monkeypatch.context() as context:
        forget_heif(context)
        plan = plan_of(options)
        plan.audit(logging.getLogger("audit"))
    assert [Path(sample.image.key).name for sample in plan.samples] == ["3.avif"]
    assert f"0.heic cannot be read: it requires {MISSING}" in caplog.text
    assert len(plan_of(options).samples) == len(FORMATS)


def test_a_folder_of_photos_alone_names_the_package(photos: Path, tmp_path: Path, without_heif: None) -> None:
    for path in [*photos.glob("*.avif"), *photos.glob("*.jpg")]:
        path.unlink()
    with pytest.raises(UserError) as error:
        plan_of(write_config(tmp_path / "a.toml", SUBSET + "image_dir = '{here}/photos'"))
    assert f"3 images are left out: they require {MISSING}" in str(error.value)


def test_controls_that_need_the_package_name_it(photos: Path, tmp_path: Path, without_heif: None) -> None:
    (tmp_path / "controls").mkdir()
    shutil.copy(photos / "0.heic", tmp_path / "controls" / "3.heic")
    shutil.copy(photos / "4.jpg", tmp_path / "controls")
    for path in photos.glob("[0124]*"):
        path.unlink()
    with pytest.raises(UserError) as error:
        text = "image_dir = '{here}/photos'\ncontrol_dirs = ['{here}/controls']"
        plan_of(write_config(tmp_path / "a.toml", SUBSET + text))
    assert f"1 images are left out: they require {MISSING}: 3.heic" in str(error.value)


@pytest.mark.parametrize("name", ["0.heic", "4.jpg"])
def test_a_photo_that_cannot_be_opened_names_the_package(photos: Path, without_heif: None, name: str) -> None:
    for content in (None, (photos / name).read_bytes()):
        with pytest.raises(UserError) as error:
            read_pixels(str(photos / name), content)
        assert str(error.value) == f"{photos / name} cannot be read: it requires {MISSING}"


def test_commands_without_images_name_the_package(
    photos: Path, tmp_path: Path, without_heif: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*photos.glob("*.avif"), *photos.glob("*.jpg")]:
        path.unlink()
    assert captions_to_metadata.main([str(photos), str(tmp_path / "meta.json"), "--full_path"]) == 1
    assert resize_images.main([str(photos), str(tmp_path / "small"), "--max_resolution", "32x32"]) == 1
    assert capsys.readouterr().err.count(f"3 images are left out: they require {MISSING}") == 2
