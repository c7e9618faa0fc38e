"""Measures of an image's pixels before training: similarity, blur and emptiness."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from library.data.decoding.images import TRANSPOSITIONS, decode_all, open_image, read_orientation, read_pixels
from library.data.description.buckets import Size
from library.data.scanned.images import ScannedImage
from library.data.sources.storage.storage import Storage
from library.errors import UserError
from library.progress import progress_bar

HASH_BITS = 64
HASH_SIDE = 128  # size to which images are shrunk before hashing; whole images would take ten times as long
NUM_TILES = 4  # per side: an image with one sharp tile is not blurred, whatever its background


@dataclass(frozen=True)
class Look:
    """The measures of one image; if its pixels cannot be decoded, `problem` says why and the rest is unset."""

    path: str
    hash: int = 0  # perceptual, 64 bits: images of one motif differ in few of them
    sharpness: float = 0.0  # the variance of the Laplacian in the sharpest of 4 x 4 tiles, of 8-bit grey values
    contrast: float = 0.0  # the standard deviation of 8-bit grey values
    problem: str | None = None
    num_frames: int = 1
    transparent: float = 0.0  # share of pixels that are not opaque
    is_cmyk: bool = False


def look_at(path: str, trained: Size, content: bytes | None = None) -> Look:
    """Decode an image in grey at a sufficient size, and measure it at its training size.

    `content` is its file, if read. A smaller image is measured at its own size: upscaling would blur it. The hash is
    ImageHash's `phash`, the sharpness that of Pech-Pacheco et al. (2000), "Diatom autofocusing in brightfield
    microscopy".
    """
    import imagehash

    try:
        with open_image(path, content) as image:
            num_frames, is_cmyk = int(getattr(image, "n_frames", 1)), image.mode == "CMYK"
        grey, transparent = read_grey(path, trained, content)
    except (UserError, OSError) as error:
        return Look(path, problem=str(error).removeprefix(path).strip())
    if grey.width > trained[0] and grey.height > trained[1]:
        ratio = max(trained[0] / grey.width, trained[1] / grey.height)
        size = max(1, round(grey.width * ratio)), max(1, round(grey.height * ratio))
        grey = grey.resize(size, Image.Resampling.BOX)
    pixels = np.asarray(grey)
    small = grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    bits = imagehash.phash(small).hash.flatten()
    return Look(
        path,
        int("".join("1" if bit else "0" for bit in bits), 2),
        measure_sharpness(pixels),
        standard_deviation(pixels),
        num_frames=num_frames,
        transparent=transparent,
        is_cmyk=is_cmyk,
    )


def read_grey(path: str, trained: Size, content: bytes | None = None) -> tuple[Image.Image, float]:
    """Return the image in grey, upright, a JPEG at a sufficient size, and the share of pixels that are not opaque.

    Raises UserError if it cannot be decoded.
    """
    with open_image(path, content) as image:
        if image.format == "JPEG":
            orientation = read_orientation(image)
            image.draft("L", trained)  # the decoder halves the size, which is faster
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
    """Return the standard deviation; OpenCV takes a tenth of NumPy's time."""
    return float(cv2.meanStdDev(values_HW)[1][0, 0])


def look_at_all(images: Sequence[tuple[ScannedImage, Size]], storage: Storage, num_threads: int = 0) -> list[Look]:
    """Measure (image, training size) pairs in order, with a progress bar; decoders release the interpreter lock."""
    threads = num_threads or os.cpu_count() or 1

    def look(pair: tuple[ScannedImage, Size]) -> Look:
        image, trained = pair
        try:
            return look_at(image.key, trained, storage.content(image))
        except UserError as error:
            return Look(image.key, problem=str(error))

    with ThreadPoolExecutor(threads) as pool, progress_bar("examining images", len(images)) as bar:
        found = []
        for one in pool.map(look, images):
            found.append(one)
            bar.update(1)
        return found


def similar_pairs(hashes: Sequence[int], most_bits: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of places of hashes that differ in at most `most_bits`, each pair once."""
    # Pigeonhole principle: with more bands than bits that may differ, at least one band is equal, so only hashes that
    # share a band are compared. That finds every pair, in about linear time while few are alike.
    num_bands = most_bits + 1
    edges = [HASH_BITS * band // num_bands for band in range(num_bands + 1)]
    seen: set[tuple[int, int]] = set()
    for low, high in pairwise(edges):
        places: dict[int, list[int]] = {}
        for place, value in enumerate(hashes):
            same = places.setdefault((value >> low) & ((1 << (high - low)) - 1), [])
            for other in same:
                if (hashes[other] ^ value).bit_count() <= most_bits and (other, place) not in seen:
                    seen.add((other, place))
                    yield other, place
            same.append(place)


def connect_groups(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the connected groups of places, each in order."""
    leader: dict[int, int] = {}

    def find(place: int) -> int:
        while leader.setdefault(place, place) != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    for a, b in pairs:
        first, second = sorted((find(a), find(b)))
        leader[second] = first
    groups: dict[int, list[int]] = {}
    for place in sorted(leader):
        groups.setdefault(find(place), []).append(place)
    return list(groups.values())
