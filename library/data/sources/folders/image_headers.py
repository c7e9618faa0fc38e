"""Fast reading of width and height from the first bytes of common images.

Pillow needs about 40 microseconds per header, which dominates the start with many images. These functions answer only
if nothing can change the result: no EXIF or XMP, which may rotate the image, no damage, nothing unusual. Otherwise they
return None, and Pillow reads the header.
"""

import struct
import zlib
from collections.abc import Callable

from library.data.description.buckets import Size

MAX_PIXELS = 50_000_000  # Pillow warns about much larger images

_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_MODES = {(8, 0), (8, 2), (8, 3), (8, 4), (8, 6), (16, 0), (16, 2), (16, 6), (1, 0), (1, 3)}  # (depth, colour type)
_PNG_HARMLESS = (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"PLTE", b"tRNS")
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
# 0xE1 is left out: it holds EXIF and XMP.
_JPEG_SKIPPED = (0xDB, 0xC4, 0xDD, 0xFE, 0xE0, 0xE2, 0xEE)  # tables, restart, comment, JFIF, ICC, Adobe


def plain_size(head: bytes, file_bytes: int) -> Size | None:
    """Return (width, height) of an image that starts with `head`; None if Pillow must read it."""
    read = _READERS.get(head[:3])
    size = read(head, file_bytes) if read is not None else None
    if size is None or min(size) <= 0 or size[0] * size[1] > MAX_PIXELS:
        return None
    return size


def _png_size(head: bytes, file_bytes: int) -> Size | None:
    if len(head) < 33 or head[:16] != _PNG_START:
        return None
    width, height, depth, colour, compression, filtering, interlace, checksum = struct.unpack_from(
        ">IIBBBBBI", head, 16
    )
    if (depth, colour) not in _PNG_MODES or compression or filtering or interlace > 1:
        return None
    if zlib.crc32(head[12:29]) != checksum:
        return None
    position = 33
    while (kind := head[position + 4 : position + 8]) != b"IDAT":
        # Pillow takes a text chunk with the keyword exif for EXIF.
        is_text = kind == b"tEXt" and not head.startswith(b"exif\x00", position + 8)
        if not is_text and kind not in _PNG_HARMLESS:  # also true at the end of the head
            return None
        (num_bytes,) = struct.unpack_from(">I", head, position)
        end = position + 8 + num_bytes
        if len(head) < end + 4 or zlib.crc32(head[position + 4 : end]) != struct.unpack_from(">I", head, end)[0]:
            return None
        position = end + 4
    return width, height


def _jpeg_size(head: bytes, file_bytes: int) -> Size | None:
    size, position, length = None, 2, len(head)
    while position + 10 <= length:
        if head[position] != 0xFF:
            return None
        marker = head[position + 1]
        num_bytes = head[position + 2] << 8 | head[position + 3]
        if marker in _JPEG_FRAMES:
            if size is not None or head[position + 4] != 8 or head[position + 9] not in (1, 3, 4):
                return None
            size = (head[position + 7] << 8 | head[position + 8], head[position + 5] << 8 | head[position + 6])
        elif marker == 0xDA:  # pixels follow
            return size
        elif marker not in _JPEG_SKIPPED or num_bytes < 2:
            return None
        position += 2 + num_bytes
    return None


def _webp_size(head: bytes, file_bytes: int) -> Size | None:
    if len(head) < 30 or head[:4] + head[8:12] != b"RIFFWEBP" or struct.unpack_from("<I", head, 4)[0] + 8 > file_bytes:
        return None
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        # The upper two bits are a scale for display.
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None  # the extended format may have tags or animation


_READERS: dict[bytes, Callable[[bytes, int], Size | None]] = {
    b"\x89PN": _png_size,
    b"\xff\xd8\xff": _jpeg_size,
    b"RIF": _webp_size,
}
