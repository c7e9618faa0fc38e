"""Image files: sizes from the first bytes, HEIC and AVIF, and malicious ones."""

import errno
import io
import logging
import os
import shutil
import struct
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pillow_heif.HeifImagePlugin  # noqa: F401  # registers the format for saving
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from library.base.errors import UserError
from library.data.decoding.images import HEAD_BYTES, ORIENTATION, read_orientation, read_pixels, read_size
from library.data.description import image_extensions
from library.data.description.image_extensions import plugin_for
from library.data.plan.audit_pixels import read_grey
from library.data.sources.folders.image_headers import plain_size
from library.data.sources.folders.reading import read_image_size
from library.environment.requirements import quote
from tests.unit.data.builders import SPEC, batches_of, options_of, plan_of, write_config, write_folder, write_image
from tests.unit.data.shard_builders import write_tar
from tests.unit.data.test_cache import cache, file_of, latents_by_key
from tools import captions_to_metadata, resize_images

MODES = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}


def encode_image(kind: str, mode: str, size: tuple[int, int], **arguments: object) -> bytes:
    target = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.new("I;16", size, 777) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(target, kind, **arguments)
    return target.getvalue()


def size_by_pillow(content: bytes) -> tuple[int, int] | None:
    """Return Pillow's size after applying the orientation, or None if it cannot open the image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            return (height, width) if read_orientation(image) >= 5 else (width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def size_by_header(content: bytes) -> tuple[int, int] | None:
    return plain_size(content[:HEAD_BYTES], len(content))


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
@pytest.mark.parametrize("size", [(1, 1), (17, 300), (640, 1)])
def test_plain_images_give_their_size(kind, mode, size):
    content = encode_image(kind, mode, size)
    assert size_by_pillow(content) == size
    assert size_by_header(content) in (size, None)
    if (kind, mode) != ("WEBP", "RGBA"):
        assert size_by_header(content) == size


@pytest.mark.parametrize(
    "arguments", [{"progressive": True}, {"quality": 100}, {"comment": b"x" * 999}, {"dpi": (9, 9)}]
)
def test_jpegs_with_various_options_give_their_size(arguments):
    assert size_by_header(encode_image("JPEG", "RGB", (40, 30), **arguments)) == (40, 30)


def test_lossless_webp_gives_its_size():
    assert size_by_header(encode_image("WEBP", "RGB", (40, 30), lossless=True)) == (40, 30)


def test_a_png_with_text_gives_its_size_unless_the_text_may_be_exif():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    assert size_by_header(encode_image("PNG", "RGB", (40, 30), pnginfo=info)) == (40, 30)
    info.add_text("exif", "II*")
    assert size_by_header(encode_image("PNG", "RGB", (40, 30), pnginfo=info)) is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", MODES)
def test_an_image_with_an_exif_orientation_is_left_to_pillow(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode_image(kind, "RGB", (40, 30), exif=exif)
    assert size_by_header(content) is None and size_by_pillow(content) == ((40, 30) if orientation < 5 else (30, 40))


def test_an_orientation_in_xmp_is_left_to_pillow():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    content = encode_image("JPEG", "RGB", (40, 30), xmp=xmp)
    assert size_by_header(content) is None and size_by_pillow(content) == (30, 40)


def test_a_png_with_a_wrong_checksum_is_left_to_pillow():
    content = bytearray(encode_image("PNG", "RGB", (40, 30)))
    content[19] ^= 1
    assert size_by_header(bytes(content)) is None and size_by_pillow(bytes(content)) is None


def test_images_too_large_to_be_plain_are_left_to_pillow():
    content = bytearray(encode_image("PNG", "RGB", (40, 30)))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    assert size_by_header(bytes(content)) is None and size_by_pillow(bytes(content)) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*MODES]), st.data())
def test_a_damaged_header_never_gives_a_size_that_differs_from_pillows(kind, data):
    content = bytearray(encode_image(kind, "RGB", (40, 30)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 300) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(20, len(content))) :]
    size = size_by_header(bytes(content))
    theirs = size_by_pillow(bytes(content))
    # Pillow also reads the tables of a JPEG and the pixels of a WebP, so it rejects some files that are damaged there.
    assert size is None or size == theirs or (theirs is None and kind != "PNG")


# HEIC and AVIF are read wherever images are, and a missing plug-in of Pillow is named.

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


# Malicious images and caches are skipped or refused by name before memory is allocated for the sizes they claim.


def png(width: int, height: int) -> bytes:
    """Return a complete PNG file that claims a size but has only a few bytes of data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_an_image_that_claims_100000_pixels_per_side_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(100_000, 100_000))
    for read in (read_size, read_pixels):
        with pytest.raises(ValueError, match=r"bomb\.png cannot be read: .*exceeds limit"):
            read(str(path))


def test_an_oversized_image_is_skipped_and_reported(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data" / "1_thing", 2)
    (folder / "bomb.png").write_bytes(png(100_000, 100_000))
    plan = plan_of(options_of(f"--train_data_dir {tmp_path / 'data'} --resolution 64"))
    (subset,) = plan.datasets[0].subsets
    ((path, reason),) = subset.dropped
    assert path.endswith("bomb.png") and "exceeds limit" in reason
    assert plan.num_train_images == 2


def test_an_animated_image_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    rgb, _ = read_pixels(str(path))
    assert rgb.shape == (8, 8, 3) and (rgb == (255, 0, 0)).all()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"not an image at all"])
def test_a_file_that_is_not_an_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd name (1) [ä].png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd name \(1\) \[ä\]\.png"):
        read_size(str(path))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_a_truncated_image_is_refused_by_name_or_still_complete(tmp_path: Path, ending: str) -> None:
    """Truncating the file at every 97th byte never gives an unexpected error or another size."""
    content = write_image(tmp_path / f"whole{ending}", (40, 24)).read_bytes()
    path = tmp_path / f"cut{ending}"
    num_refused = 0
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        try:
            assert read_pixels(str(path))[0].shape == (24, 40, 3)
        except ValueError as error:
            num_refused += 1
            assert path.name in str(error)
    assert num_refused > 0


def test_a_latent_file_that_claims_terabytes_is_encoded_again(tmp_path: Path) -> None:
    write_folder(tmp_path / "2_a", 1)
    first, _ = cache(tmp_path)
    path = file_of(tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 8, 8)})
    with np.load(path) as archive:
        names = archive.files
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    again, num_encoded = cache(tmp_path)
    assert num_encoded == 1
    assert latents_by_key(first) == latents_by_key(again)


def test_a_folder_without_permissions_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permission error is simulated, because root may run this test and is never refused."""

    def refuse(folder: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    folder = write_folder(tmp_path / "data" / "1_thing", 1)
    options = write_config(
        tmp_path / "d.toml", f"[[datasets]]\nresolution=64\n[[datasets.subsets]]\nimage_dir='{folder}'"
    )
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="1_thing cannot be read: Permission denied; change its permissions"):
        plan_of(options)
