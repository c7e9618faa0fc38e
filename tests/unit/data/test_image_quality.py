"""The audit of pixels: near-duplicates, blur, single colours and damage."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from library.data.plan.audit_findings import BLURRED, EMPTY, MOST_BITS, collect_findings
from library.data.plan.audit_pixels import (
    HASH_BITS,
    PixelMeasures,
    connect_groups,
    measure_pixels,
    measure_sharpness,
    similar_pairs,
)

TRAINED = (256, 256)


def scene(seed: int, side: int = 400) -> Image.Image:
    """Draw an image with coarse and fine structure and a few shapes with sharp edges."""
    rng = np.random.default_rng(seed)
    summed = np.zeros((side, side, 3))
    for cells, strength in ((4, 110), (12, 60), (40, 30), (200, 20)):
        small = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        summed += np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255 * strength
    image = Image.fromarray(summed.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        draw.rectangle((x, y, x + side // 8, y + side // 6), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image


def measure_image(image: Image.Image, path: Path, **save_options: int) -> PixelMeasures:
    image.save(path, **save_options)
    return measure_pixels(str(path), TRAINED)


def bits_between(a: PixelMeasures, b: PixelMeasures) -> int:
    return (a.hash ^ b.hash).bit_count()


@pytest.mark.slow
def test_copies_have_similar_hashes_and_other_images_do_not(tmp_path: Path) -> None:
    scenes = [scene(seed) for seed in range(610, 618)]
    looks = [measure_image(image, tmp_path / f"{n}.png") for n, image in enumerate(scenes)]
    assert min(bits_between(a, b) for a, b in itertools.combinations(looks, 2)) > 2 * MOST_BITS
    for n, (image, look) in enumerate(zip(scenes, looks, strict=True)):
        smaller = measure_image(image.resize((300, 300)), tmp_path / f"{n}s.png")
        poorer = measure_image(image, tmp_path / f"{n}q.jpg", quality=35)
        brighter = measure_image(image.point(lambda v: min(255, v * 1.15)), tmp_path / f"{n}b.png")
        assert max(bits_between(look, other) for other in (smaller, poorer, brighter)) <= MOST_BITS


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_blur_is_distinguished_from_a_blurred_background(tmp_path: Path, suffix: str) -> None:
    image = scene(77)
    blurred = image.filter(ImageFilter.GaussianBlur(5))
    subject = blurred.copy()
    subject.paste(image.crop((0, 0, 120, 120)), (150, 150))
    sharpness = [
        measure_image(i, tmp_path / f"x{n}{suffix}").sharpness for n, i in enumerate((image, subject, blurred))
    ]
    assert sharpness[0] > 2 * BLURRED and sharpness[1] > 2 * BLURRED and sharpness[2] < BLURRED / 2


def test_sharpness_is_the_variance_of_the_laplacian_of_the_sharpest_tile() -> None:
    pixels = np.random.default_rng(9).integers(0, 255, (37, 50), dtype=np.uint8)
    padded = np.pad(pixels.astype(np.float64), 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
    tiles = [tile for row in np.array_split(laplacian, 4) for tile in np.array_split(row, 4, axis=1)]
    assert measure_sharpness(pixels) == pytest.approx(max(tile.var() for tile in tiles), rel=1e-9)


def test_similar_pairs_match_an_exhaustive_comparison() -> None:
    rng = random.Random(31)
    hashes = [rng.getrandbits(HASH_BITS) for _ in range(150)]
    for value in hashes[:60]:
        flipped = rng.sample(range(HASH_BITS), rng.randint(0, 10))
        hashes.append(value ^ sum(1 << bit for bit in flipped))
    pairs = list(similar_pairs(hashes, MOST_BITS))
    near = {
        (a, b)
        for a, b in itertools.combinations(range(len(hashes)), 2)
        if (hashes[a] ^ hashes[b]).bit_count() <= MOST_BITS
    }
    assert len(pairs) == len(set(pairs)) and {tuple(sorted(pair)) for pair in pairs} == near
    assert len(near) > 20


def test_connected_pairs_form_one_group() -> None:
    assert connect_groups([(5, 2), (7, 8), (2, 9), (8, 7)]) == [[2, 5, 9], [7, 8]]


def test_findings_list_exactly_the_conspicuous_images() -> None:
    fine = {"sharpness": 4 * BLURRED, "contrast": 5 * EMPTY}
    rng = random.Random(82)
    first, second, third, fourth = (rng.getrandbits(HASH_BITS) for _ in range(4))
    looks = [
        PixelMeasures("a", first, **fine), PixelMeasures("b", first ^ 0b11, **fine), PixelMeasures("c", second, **fine),
        PixelMeasures("v", second ^ 4, **fine), PixelMeasures("alone", third, **fine),
        PixelMeasures("red", 0, 0.0, 0.5), PixelMeasures("blue", 0, 0.0, 0.5),
        PixelMeasures("soft", fourth, BLURRED / 2, 5 * EMPTY), PixelMeasures("cut", problem="image file is truncated"),
    ]  # fmt: skip
    findings = {
        f.text.partition("image")[2].removeprefix("s").strip()[:16]: [path for path, _ in f.images]
        for f in collect_findings(looks, {"a", "b", "c"})
    }
    assert findings == {
        "cannot be decode": ["cut"],
        "of a single colo": ["red", "blue"],
        "near-duplicated ": ["c", "v"],
        "near-duplicated;": ["a", "b"],
        "blurred all over": ["soft"],
    }
    (line,) = [f.line for f in collect_findings(looks[2:4], {"c"})]
    assert line.endswith("c (group 1, trained), v (group 1, validation)")
    assert list(collect_findings([looks[4]], {"alone"})) == []


def test_16_bit_and_rotated_images_are_measured_as_they_are_trained(tmp_path: Path) -> None:
    """Pillow alone would turn the first image white and not rotate the second one."""
    image = scene(41).convert("L")
    plain = measure_image(image, tmp_path / "plain.png")
    deep = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    assert measure_image(deep, tmp_path / "deep.png") == replace(plain, path=str(tmp_path / "deep.png"))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert bits_between(measure_pixels(str(tmp_path / "turned.jpg"), TRAINED), plain) <= MOST_BITS


@pytest.mark.parametrize("at", [45, 60, 400])
def test_any_damage_is_reported(tmp_path: Path, at: int) -> None:
    path = tmp_path / "broken.png"
    scene(4).save(path)
    content = bytearray(path.read_bytes())
    content[at : at + 60] = bytes(60)
    path.write_bytes(bytes(content))
    assert measure_pixels(str(path), TRAINED).problem


def test_a_truncated_image_is_reported_without_raising(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    scene(3).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert "truncated" in (measure_pixels(str(path), TRAINED).problem or "")
