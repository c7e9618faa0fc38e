"""Image sizes read from the first bytes match Pillow's or are None."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from library.data.decoding.images import HEAD_BYTES, read_orientation
from library.data.sources.folders.image_headers import plain_size

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
