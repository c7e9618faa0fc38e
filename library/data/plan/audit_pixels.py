"""Measurements of an image's pixels for the audit: similarity, blur and emptiness."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.base.errors import UserError, reason_of
from library.base.progress import progress_bar
from library.data.decoding.images import (
    MAKE,
    MODEL,
    TRANSPOSITIONS,
    decode_all,
    open_image,
    read_orientation,
    read_pixels,
    read_tags,
)
from library.data.description.buckets import Size
from library.data.scanned.images import ScannedImage
from library.data.sources.storage.storage import Storage

HASH_BITS = 64
HASH_SIDE = 128  # images are shrunk to this before hashing; hashing whole images takes ten times as long
NUM_TILES = 4  # per side; one sharp tile is enough, whatever the background


@dataclass(frozen=True)
class PixelMeasures:
    """The measurements of an image. If its pixels cannot be decoded, `problem` is the reason and the rest is unset."""

    path: str
    hash: int = 0  # perceptual, 64 bits; similar images differ in few of them
    sharpness: float = 0.0  # variance of the Laplacian of 8-bit grey values in the sharpest of 4 x 4 tiles
    contrast: float = 0.0  # standard deviation of 8-bit grey values
    problem: str | None = None
    num_frames: int = 1
    transparent: float = 0.0  # share of pixels that are not fully opaque
    is_cmyk: bool = False
    size: Size = (0, 0)  # of the file, in pixels, whatever its orientation
    has_camera: bool = False  # its EXIF names a camera or a phone


def measure_pixels(path: str, trained: Size, content: bytes | None = None) -> PixelMeasures:
    """Decode an image in grey, and measure it at its training size.

    `content` is its file, if already read. An image smaller than that is measured at its own size, because upscaling
    would blur it. The hash is ImageHash's `phash`; the sharpness is that of Pech-Pacheco et al. (2000), "Diatom
    autofocusing in brightfield microscopy".
    """
    try:
        with open_image(path, content) as image:
            num_frames, is_cmyk = int(getattr(image, "n_frames", 1)), image.mode == "CMYK"
            file_size, tags = image.size, read_tags(image)
            has_camera = any(tags.get(tag) for tag in (MAKE, MODEL))
        grey, transparent = read_grey(path, trained, content)
    except (UserError, OSError) as error:
        return PixelMeasures(path, problem=reason_of(error))
    if grey.width > trained[0] and grey.height > trained[1]:
        ratio = max(trained[0] / grey.width, trained[1] / grey.height)
        size = max(1, round(grey.width * ratio)), max(1, round(grey.height * ratio))
        grey = grey.resize(size, Image.Resampling.BOX)
    pixels = np.asarray(grey)
    return PixelMeasures(
        path,
        perceptual_hash(grey),
        measure_sharpness(pixels),
        standard_deviation(pixels),
        num_frames=num_frames,
        transparent=transparent,
        is_cmyk=is_cmyk,
        size=file_size,
        has_camera=has_camera,
    )


def perceptual_hash(grey: Image.Image) -> int:
    """Return the 64 bits of ImageHash's `phash`; similar images differ in few of them."""
    import imagehash

    small = grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    return int("".join("1" if bit else "0" for bit in imagehash.phash(small).hash.flatten()), 2)


def read_grey(path: str, trained: Size, content: bytes | None = None) -> tuple[Image.Image, float]:
    """Return (the image in grey, upright; the share of pixels that are not fully opaque). A JPEG may be decoded at a
    reduced size.

    Raises UserError if the image cannot be decoded.
    """
    with open_image(path, content) as image:
        if image.format == "JPEG":
            orientation = read_orientation(image)
            image.draft("L", trained)  # lets the decoder halve the size, which is faster
            decode_all(image, path)
            grey = image.convert("L")
            return grey.transpose(TRANSPOSITIONS[orientation]) if orientation in TRANSPOSITIONS else grey, 0.0
    pixels, alpha_HW = read_pixels(path, content)
    return Image.fromarray(pixels).convert("L"), 0.0 if alpha_HW is None else float((alpha_HW < 255).mean())


def measure_sharpness(grey_HW: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian in the sharpest tile."""
    laplacian = cv2.Laplacian(grey_HW, cv2.CV_16S)
    rows = np.array_split(laplacian, NUM_TILES, axis=0)
    tiles = [tile for row in rows for tile in np.array_split(row, NUM_TILES, axis=1) if tile.size]
    return max(standard_deviation(tile) ** 2 for tile in tiles)


def standard_deviation(values_HW: NDArray[np.uint8] | NDArray[np.int16]) -> float:
    """Return the standard deviation. OpenCV takes a tenth of NumPy's time for it."""
    return float(cv2.meanStdDev(values_HW)[1][0, 0])


def measure_all_pixels(
    images: Sequence[tuple[ScannedImage, Size]], storage: Storage, num_threads: int = 0
) -> list[PixelMeasures]:
    """Measure (image, training size) pairs, in order, with a progress bar. Threads help because decoders release the
    interpreter lock."""
    threads = num_threads or os.cpu_count() or 1

    def measure(pair: tuple[ScannedImage, Size]) -> PixelMeasures:
        image, trained = pair
        try:
            return measure_pixels(image.key, trained, storage.content(image))
        except UserError as error:
            return PixelMeasures(image.key, problem=str(error))

    with ThreadPoolExecutor(threads) as pool, progress_bar("examining images", len(images)) as bar:
        measures = []
        for measured in pool.map(measure, images):
            measures.append(measured)
            bar.update(1)
        return measures


def similar_pairs(hashes: Sequence[int], most_bits: int) -> Iterator[tuple[int, int]]:
    """Yield each pair of indices of hashes that differ in at most `most_bits` bits, once."""
    # Pigeonhole principle: with more bands than differing bits, at least one band is equal, so only hashes that share a
    # band are compared. This finds every pair, in nearly linear time while few hashes are similar.
    num_bands = most_bits + 1
    edges = [HASH_BITS * band // num_bands for band in range(num_bands + 1)]
    seen: set[tuple[int, int]] = set()
    for low, high in pairwise(edges):
        indices_by_band: dict[int, list[int]] = {}
        for index, value in enumerate(hashes):
            same_band = indices_by_band.setdefault((value >> low) & ((1 << (high - low)) - 1), [])
            for other in same_band:
                if (hashes[other] ^ value).bit_count() <= most_bits and (other, index) not in seen:
                    seen.add((other, index))
                    yield other, index
            same_band.append(index)


def connect_groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected components of the pairs, as sorted lists of indices."""
    parent: dict[int, int] = {}

    def find(index: int) -> int:
        while parent.setdefault(index, index) != index:
            # Path halving keeps the chains short.
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for a, b in pairs:
        first, second = sorted((find(a), find(b)))
        parent[second] = first
    groups: dict[int, list[int]] = {}
    for index in sorted(parent):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())
