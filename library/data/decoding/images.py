"""Images as arrays: reading, resizing, cropping, mirroring, colour changes.

Arrays are uint8, HWC or HW; sizes are (width, height).
"""

import io
import os
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, UnidentifiedImageError

from library.base.errors import UserError, of_file
from library.data.description.buckets import Shape, Size
from library.data.description.image_extensions import load_plugin, plugin_for

Pixels = NDArray[np.uint8]

HEAD_BYTES = 4096
# JPEG, GIF, JPEG XL and JPEG 2000
COMPRESSED = (b"\xff\xd8\xff", b"GIF8", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")
ORIENTATION = 0x0112  # EXIF
MAKE, MODEL = 0x010F, 0x0110  # EXIF of a camera or a phone
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ENHANCEMENTS = {  # key of a subset -> what changes
    "brightness_aug": ImageEnhance.Brightness,
    "contrast_aug": ImageEnhance.Contrast,
    "saturation_aug": ImageEnhance.Color,
}


class DamagedImage(UserError):
    """An image with a valid header whose pixels cannot be decoded; the message names it."""


def open_image(path: str, content: bytes | io.RawIOBase | None = None) -> Image.Image:
    """Open an image and read its header. `content` is the file's content or an open file. Raises UserError naming a
    file that is not an image."""
    load_plugin(os.path.splitext(path)[1][1:].lower())
    opened: Any = io.BytesIO(content) if isinstance(content, bytes) else path if content is None else content
    for _ in range(2):  # the second time with the plug-in of an image whose name has another extension
        try:
            return Image.open(opened)
        except UnidentifiedImageError:
            head = read_head(opened)
            if plugin := plugin_for(path, head):
                raise of_file(path, cause="not installed")(f"cannot be read: it requires {plugin}") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise of_file(path, cause="unreadable")(f"cannot be read: {error}") from None
    raise of_file(path, cause="unreadable")(f"is {'not an image that can be read' if head else 'empty'}")


def read_head(opened: Any) -> bytes:
    """Return the first 12 bytes of a path or an open file."""
    with open(opened, "rb") if isinstance(opened, str) else nullcontext(opened) as file:
        file.seek(0)
        head: bytes = file.read(12)
    return head


def is_compressed(content: bytes) -> bool:
    """Return True if an image, given at least its first 4096 bytes, is in a format whose files hardly ever have the
    same size if they show something else. Its name does not matter."""
    if content.startswith(b"\x89PNG"):
        # The first block of the pixels begins after two bytes of zlib; its type is 0 if it is stored as it is.
        pixels = content.find(b"IDAT", 0, HEAD_BYTES) + 6
        return not (6 <= pixels < len(content) and content[pixels] & 0b110 == 0)
    return content.startswith(COMPRESSED) or content[4:8] == b"ftyp" or content[8:12] == b"WEBP"  # HEIF and AVIF


def read_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the EXIF tags without decoding. A PNG's tags count only if they precede the pixels."""
    # For such a PNG, getexif() decodes all pixels to look for tags behind them.
    if image.format == "PNG" and "exif" not in image.info:
        return {}
    try:
        tags: Mapping[int, Any] = image.getexif()
    except Exception:  # damaged tags must not cost the image, and Pillow raises many errors here
        return {}
    return tags


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, without decoding: 1 for a TIFF, which Pillow turns upright itself. A PNG's
    tags count only if they precede the pixels."""
    if image.format == "TIFF":
        return 1
    value = read_tags(image).get(ORIENTATION, 1)
    return value if value in TRANSPOSITIONS else 1


def read_size(path: str, content: bytes | io.RawIOBase | None = None) -> Size:
    """Read (width, height) from the header, upright as `read_pixels` returns it. `content` is the file's content or
    an open file."""
    with open_image(path, content) as image:
        width, height = image.size
        # Orientations 5 to 8 swap width and height.
        is_transposed = read_orientation(image) >= 5
    if width <= 0 or height <= 0:
        raise of_file(path)(f"is {width}x{height} pixels")
    return (height, width) if is_transposed else (width, height)


def decode_all(image: Image.Image, path: str) -> None:
    """Decode an opened image. Raises DamagedImage if the pixels are truncated or damaged."""
    try:
        image.load()
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # damaged pixels raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise of_file(path, cause="unreadable", kind=DamagedImage)(f"is damaged: {error}") from None


def read_pixels(path: str, content: bytes | None = None) -> tuple[Pixels, Pixels | None]:
    """Read an image as (RGB, alpha), upright; alpha is None if it has none.

    Raises DamagedImage if the pixels are truncated or damaged, UserError if the file is not an image.
    """
    with open_image(path, content) as image:
        orientation = read_orientation(image)
        decode_all(image, path)
        upright = image.transpose(TRANSPOSITIONS[orientation]) if orientation in TRANSPOSITIONS else image
        if upright.mode.startswith("I"):
            return _from_16_bits(upright), None
        if has_alpha(upright):
            rgba = np.asarray(upright.convert("RGBA"))
            return np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB")), None


def with_alpha(rgb: Pixels, alpha: Pixels | None) -> Pixels:
    """Combine RGB and alpha to RGBA; opaque if `alpha` is None."""
    return np.dstack([rgb, np.full(rgb.shape[:2], 255, dtype=np.uint8) if alpha is None else alpha])


def has_alpha(image: Image.Image) -> bool:
    """Return True if an image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _from_16_bits(image: Image.Image) -> Pixels:
    # Pillow's own conversion clips at 255, which turns 16-bit grey images white.
    grey = np.asarray(image).astype(np.int64)
    # 257 = 65535 / 255; 128 rounds to the nearest.
    grey_8bit = ((np.clip(grey, 0, 65535) + 128) // 257).astype(np.uint8)
    return np.repeat(grey_8bit[..., None], 3, axis=2)


@dataclass(frozen=True, slots=True)
class Placement:
    """The geometry of a training image: resize to `resized`, crop `target` at (left, top), mirror if `is_flipped`."""

    resized: Size
    left: int
    top: int
    target: Size
    is_flipped: bool = False


def crop_at_centre(shape: Shape, is_flipped: bool = False) -> Placement:
    """Place the crop at the centre."""
    left, top = (shape.resized[0] - shape.bucket[0]) // 2, (shape.resized[1] - shape.bucket[1]) // 2
    return Placement(shape.resized, left, top, shape.bucket, is_flipped)


def crop_at_random(shape: Shape, rng: random.Random, is_flipped: bool = False) -> Placement:
    """Place the crop at a random position."""
    left = rng.randint(0, shape.resized[0] - shape.bucket[0])
    top = rng.randint(0, shape.resized[1] - shape.bucket[1])
    return Placement(shape.resized, left, top, shape.bucket, is_flipped)


@dataclass(frozen=True, slots=True)
class Face:
    """A face: its centre and size, in pixels of the image."""

    cx: int
    cy: int
    width: int
    height: int


def parse_face(path: str) -> Face | None:
    """Parse the face in a file name `..._cx_cy_w_h`."""
    parts = os.path.splitext(os.path.basename(path))[0].split("_")
    if len(parts) < 5:
        return None
    try:
        face = Face(*(int(part) for part in parts[-4:]))
    except ValueError:
        return None
    return face if face.width > 0 and face.height > 0 else None


def crop_at_face(
    image: Size,
    target: Size,
    face: Face,
    zoom_range: tuple[float, float],
    wanders: bool,
    rng: random.Random,
    is_flipped: bool = False,
) -> Placement:
    """Place the crop around a face, zoomed so that the shorter target side is `zoom` times the face's larger side.

    `zoom` is drawn from `zoom_range`, but the image is enlarged only as far as needed to cover the target. The face is
    near the centre; `wanders` moves it by a triangularly distributed offset that shows more of the background.
    """
    face_side, short_side = max(face.width, face.height), min(target)
    min_scale = max(target[0] / image[0], target[1] / image[1])
    max_scale = max(1.0, min_scale)
    low = min(max_scale, max(min_scale, short_side / (face_side * zoom_range[1])))
    high = min(max_scale, max(low, short_side / (face_side * zoom_range[0])))
    scale = rng.uniform(low, high)
    resized = (max(target[0], int(image[0] * scale + 0.5)), max(target[1], int(image[1] * scale + 0.5)))
    corner = []
    for side, length, centre in zip(target, resized, (face.cx, face.cy), strict=True):
        middle = int(centre * scale + 0.5)
        start = middle - side // 2
        if wanders:
            reach = max(length - middle, middle)
            # As in sd-scripts; the sum of two uniform draws has a triangular distribution.
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif zoom_range[0] != zoom_range[1]:
            # A twentieth of the face, as in sd-scripts.
            jitter = int(face_side * scale) // 20
            start += rng.randint(-jitter, jitter)
        corner.append(max(0, min(start, length - side)))
    return Placement(resized, corner[0], corner[1], target, is_flipped)


def apply_placement(pixels: Pixels, placement: Placement, interpolation: str | None) -> Pixels:
    """Resize, crop and mirror an array."""
    resized = resize(pixels, placement.resized, interpolation)
    width, height = placement.target
    cropped = resized[placement.top : placement.top + height, placement.left : placement.left + width]
    # A copy, because a mirrored view has negative strides, which torch.from_numpy refuses.
    return np.array(cropped[:, ::-1] if placement.is_flipped else cropped, order="C")


def choose_filter(size: Size, target: Size, interpolation: str | None) -> str:
    """Return the resampling filter: `interpolation` if given, else area if no side grows, else lanczos."""
    if interpolation is not None:
        return interpolation
    # The defaults are sd-scripts'.
    return "area" if target[0] <= size[0] and target[1] <= size[1] else "lanczos"


PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC, "cubic": Image.Resampling.BICUBIC, "area": Image.Resampling.BOX,
    "box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip


def resize(pixels: Pixels, target: Size, interpolation: str | None) -> Pixels:
    """Resize an array. As in sd-scripts, lanczos and box are Pillow's filters and the others OpenCV's. RGBA always
    uses Pillow, which keeps colours under transparent pixels from bleeding into their neighbours."""
    size = (pixels.shape[1], pixels.shape[0])
    if size == target:
        return pixels
    name = choose_filter(size, target, interpolation)
    if pixels.shape[2:] == (4,):
        return np.array(Image.fromarray(pixels).resize(target, PILLOW_FILTERS[name]))
    if name in ("lanczos", "box"):
        return np.array(Image.fromarray(pixels).resize(target, PILLOW_FILTERS[name]))
    import cv2

    kinds: dict[str, int] = {
        # The exact variant, as in sd-scripts.
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    resized: Any = cv2.resize(pixels, target, interpolation=kinds[name])
    return np.asarray(resized, dtype=np.uint8)


def change_colour(rgb: Pixels, rng: random.Random) -> Pixels:
    """Change the colours with a probability of 0.33: half of these draws shift the hue by up to 16 degrees, half
    apply a gamma of 0.95 to 1.05. Alpha is unchanged."""
    if rgb.shape[2] == 4:
        return with_alpha(change_colour(np.ascontiguousarray(rgb[..., :3]), rng), rgb[..., 3])
    # Probabilities and ranges are sd-scripts'.
    if rng.random() >= 0.33:
        return rgb
    if rng.random() < 0.5:
        return turn_hue(rgb, rng.uniform(-8, 8))
    return apply_gamma(rgb, rng.uniform(0.95, 1.05))


def change_light(rgb: Pixels, largest: Mapping[str, float], rng: random.Random) -> Pixels:
    """Multiply brightness, contrast and saturation, in this order, each by a factor within its `largest` change of 1.
    Alpha is unchanged."""
    if rgb.shape[2] == 4:
        return with_alpha(change_light(np.ascontiguousarray(rgb[..., :3]), largest, rng), rgb[..., 3])
    image = Image.fromarray(rgb)
    for name, enhancement in ENHANCEMENTS.items():
        if largest[name]:
            image = enhancement(image).enhance(1 + rng.uniform(-largest[name], largest[name]))
    return np.array(image)


def turn_hue(rgb: Pixels, half_degrees: float) -> Pixels:
    """Rotate the hue. The unit is two degrees, as in OpenCV's 8-bit images."""
    import cv2

    hsv = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV))
    hue = np.rint(hsv[..., 0].astype(np.float32) + half_degrees) % 180
    hsv[..., 0] = hue.astype(np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)


def apply_gamma(rgb: Pixels, gamma: float) -> Pixels:
    """Raise values, scaled to 0..1, to the power `gamma`. Black and white are unchanged."""
    # sd-scripts raises 0..255 itself to the power, so white becomes 193 at a gamma of 0.95.
    table = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[rgb]
