"""Malicious images and caches are skipped or refused by name before memory is allocated for the sizes they claim."""

import errno
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.data.decoding.images import read_pixels, read_size
from tests.unit.data.builders import options_of, plan_of, write_config, write_folder, write_image
from tests.unit.data.test_cache import cache, file_of, latents_by_key


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
