"""Bucket sizes, and reading, resizing, cropping and colour changes of images."""

import io
import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from library.base.errors import UserError
from library.data.decoding.images import (
    Face,
    Placement,
    apply_gamma,
    apply_placement,
    change_colour,
    change_light,
    crop_at_centre,
    crop_at_face,
    crop_at_random,
    parse_face,
    read_pixels,
    read_size,
    resize,
    turn_hue,
)
from library.data.description.buckets import BucketRules, ReferenceRules, Shape, assign_shapes, bucket_sizes, crop_ltrb
from tests.unit.data.builders import write_image


def parse_sizes(text: str) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in (size.split("x") for size in text.split())]


def bucket_rules(no_upscale: bool = False, resolution: tuple[int, int] = (512, 512)) -> BucketRules:
    return BucketRules(resolution, True, 256, 1024, 64, no_upscale, 64).checked()


LISTS = [
    (
        ((512, 512), 256, 1024, 64),
        "256x832 256x896 256x960 256x1024 320x704 320x768 384x640 448x576 512x512 576x448 640x384 704x320 768x320 "
        "832x256 896x256 960x256 1024x256",
    ),
    (
        ((768, 512), 256, 1024, 64),
        "256x1024 320x1024 384x896 384x960 384x1024 448x832 512x704 512x768 576x576 576x640 640x576 704x512 768x512 "
        "832x448 896x384 960x384 1024x256 1024x320 1024x384",
    ),
    (((512, 512), 320, 960, 64), "320x704 320x768 384x640 448x576 512x512 576x448 640x384 704x320 768x320"),
]


@pytest.mark.parametrize(("arguments", "expected"), LISTS)
def test_bucket_sizes_match_the_reference_lists(arguments, expected):
    assert bucket_sizes(*arguments) == parse_sizes(expected)


@pytest.mark.parametrize(
    ("arguments", "count"), [(((1024, 1024), 256, 2048, 64), 41), (((1024, 1024), 512, 2048, 32), 65)]
)
def test_the_number_of_buckets_at_1024_matches_the_reference(arguments, count):
    assert len(bucket_sizes(*arguments)) == count


def test_no_side_is_below_a_limit_between_two_steps():
    assert min(map(min, bucket_sizes((512, 512), 330, 1024, 64))) == 330


ASSIGNED = [  # image, (bucket, resized), (bucket, resized) without upscaling
    ("512x512", "512x512 512x512", "512x512 512x512"),
    ("1000x1000", "512x512 512x512", "512x512 512x512"),
    ("300x200", "640x384 640x427", "256x192 300x200"),
    ("1920x1080", "640x384 683x384", "640x384 683x384"),
    ("832x1216", "384x640 438x640", "384x576 394x576"),
    ("100x1000", "256x1024 256x2560", "64x960 100x1000"),
    ("640x384", "640x384 640x384", "640x384 640x384"),
    ("513x512", "512x512 513x512", "512x512 513x512"),
    # Each side is the nearest whole number: ideal widths and heights of 511.6 and 455.1 by 575.9, and 512.9 and 478.5.
    ("600x601", "512x512 512x513", "512x512 512x513"),
    ("600x759", "448x576 455x576", "448x576 455x576"),
    ("600x642", "512x512 512x548", "448x512 479x512"),
]


@pytest.mark.parametrize(("image", "default", "no_upscale"), ASSIGNED)
def test_images_are_assigned_to_the_expected_buckets_at_512(image, default, no_upscale):
    for no_upscaling, expected in ((False, default), (True, no_upscale)):
        (shape,) = assign_shapes(parse_sizes(image), bucket_rules(no_upscaling))
        assert [shape.bucket, shape.resized] == parse_sizes(expected)


def test_a_small_image_keeps_its_size_without_upscaling():
    (shape,) = assign_shapes([(70, 70)], bucket_rules(no_upscale=True))
    assert (shape.bucket, shape.resized) == ((64, 64), (70, 70))


def test_a_side_below_the_step_gets_a_bucket_of_one_step():
    (shape,) = assign_shapes([(63, 300)], bucket_rules(no_upscale=True))
    assert (shape.bucket, shape.resized) == ((64, 256), (64, 305))


def test_a_reference_of_the_size_of_its_image_is_placed_alike():
    (target,) = assign_shapes([(300, 200)], bucket_rules(no_upscale=True))
    rules = ReferenceRules(resolution=None, no_resize=False, step=64)
    assert rules.shape((300, 200), (300, 200), target) == target
    assert rules.shape((600, 400), (300, 200), target) == Shape(target.bucket, (288, 192))


@pytest.mark.parametrize(
    ("bucket", "image", "expected"),
    [
        ((512, 512), (1000, 800), (0, 51, 512, 460.6)),
        ((640, 384), (1920, 1080), (0, 12, 640, 372)),
        ((384, 640), (800, 1200), (0, 32, 384, 608)),
    ],
)
def test_the_crop_for_size_conditioning_matches_the_reference(bucket, image, expected):
    assert crop_ltrb(bucket, image) == pytest.approx(expected, abs=1e-9)


side = st.integers(1, 4000)


@given(
    st.lists(st.tuples(side, side), min_size=1, max_size=20), st.booleans(), st.sampled_from([(512, 512), (768, 512)])
)
def test_images_cover_their_bucket_and_fit_one_side_exactly_unless_upscaling_is_off(images, no_upscale, resolution):
    rule = bucket_rules(no_upscale, resolution)
    for image, shape in zip(images, assign_shapes(images, rule), strict=True):
        assert min(shape.bucket) >= 64 and all(side % 64 == 0 for side in shape.bucket)
        assert shape.resized[0] >= shape.bucket[0] and shape.resized[1] >= shape.bucket[1]
        if no_upscale:
            grown = shape.resized[0] > image[0] or shape.resized[1] > image[1]
            assert not grown or min(shape.bucket) == 64
        else:
            assert shape.resized[0] == shape.bucket[0] or shape.resized[1] == shape.bucket[1]
            assert math.prod(shape.bucket) <= math.prod(resolution)


def test_without_buckets_every_image_is_cropped_to_the_resolution():
    rule = BucketRules((320, 192), False, 256, 1024, 64, False, 64).checked()
    shapes = assign_shapes([(320, 192), (1000, 300), (20, 60)], rule)
    assert {shape.bucket for shape in shapes} == {(320, 192)}
    assert [shape.resized for shape in shapes] == [(320, 192), (640, 192), (320, 960)]


def test_bucket_no_upscale_without_buckets_is_warned_about(caplog):
    BucketRules((320, 192), False, 256, 1024, 64, True, 64).checked()
    assert "bucket_no_upscale has no effect without enable_bucket: smaller images are enlarged" in caplog.text


def test_a_resolution_that_is_not_a_multiple_of_the_step_is_warned_about(caplog):
    BucketRules((70, 70), True, 64, 128, 64, False, 64).checked()
    assert (
        "resolution 70x70 is not a multiple of bucket_reso_steps 64: square images are trained at 64x64" in caplog.text
    )


def test_limits_are_rounded_to_the_step_with_a_warning(caplog):
    rule = BucketRules((512, 512), True, 300, 1000, 64, False, 64).checked()
    assert (rule.min_reso, rule.max_reso) == (256, 1024)
    assert "300..1000 are rounded to 256..1024" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((512, 512), True, 576, 1024, 64, False, 64), "min_bucket_reso is 576"),
        (((512, 512), True, 256, 448, 64, False, 64), "max_bucket_reso is 448"),
        (((512, 512), True, 256, 1024, 32, False, 64), "bucket_reso_steps is 32.*multiple of 64"),
        (((0, 512), False, 256, 1024, 64, False, 64), "both sides must be positive"),
        (((8192, 8192), True, 256, 8192, 64, False, 64), "resolution is 8192x8192; the maximum is 16 megapixels"),
    ],
)
def test_invalid_limits_raise_errors_that_name_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketRules(*arguments).checked()


def test_the_step_is_only_checked_with_buckets():
    assert not BucketRules((512, 512), False, 256, 1024, 17, False, 64).checked().enable_bucket


def test_a_step_above_the_resolution_is_refused():
    with pytest.raises(UserError, match=r"bucket_reso_steps is 1024, more than the shorter side .* lower"):
        BucketRules((512, 512), True, 256, 2048, 1024, False, 64).checked()


def test_a_step_above_the_minimum_side_becomes_the_minimum_side():
    limits = BucketRules((512, 512), True, 64, 1024, 128, False, 64).checked()
    assert bucket_sizes((512, 512), limits.min_reso, limits.max_reso, limits.step)[0][0] == 128


def test_a_huge_upper_limit_takes_no_time():
    assert bucket_sizes((512, 512), 256, 2**70, 64) == bucket_sizes((512, 512), 256, 1024, 64)


# Reading, resizing, cropping and colour changes of images.


def noise(shape: tuple[int, ...], seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, image: Image.Image, **kwargs: object) -> str:
    image.save(path, **kwargs)
    return str(path)


def test_rgb_is_read_unchanged(tmp_path):
    pixels = noise((20, 30, 3))
    rgb, alpha = read_pixels(save_image(tmp_path / "a.png", Image.fromarray(pixels)))
    assert np.array_equal(rgb, pixels) and alpha is None


def test_alpha_is_returned_separately_and_does_not_change_colours(tmp_path):
    pixels = noise((20, 30, 4))
    rgb, alpha = read_pixels(save_image(tmp_path / "a.png", Image.fromarray(pixels)))
    assert np.array_equal(rgb, pixels[..., :3]) and np.array_equal(alpha, pixels[..., 3])


def test_greyscale_with_alpha_becomes_rgb_and_alpha(tmp_path):
    pixels = noise((20, 30, 2))
    rgb, alpha = read_pixels(save_image(tmp_path / "a.png", Image.fromarray(pixels, mode="LA")))
    assert all(np.array_equal(rgb[..., c], pixels[..., 0]) for c in range(3))
    assert np.array_equal(alpha, pixels[..., 1])


def test_palette_images_become_rgb_with_alpha_for_a_transparent_colour(tmp_path):
    image = Image.fromarray(noise((20, 30, 3))).quantize(7)
    rgb, alpha = read_pixels(save_image(tmp_path / "a.png", image))
    assert np.array_equal(rgb, np.asarray(image.convert("RGB"))) and alpha is None
    rgb, alpha = read_pixels(save_image(tmp_path / "b.png", image, transparency=3))
    assert np.array_equal(rgb, np.asarray(image.convert("RGB")))
    assert np.array_equal(alpha, np.where(np.asarray(image) == 3, 0, 255))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_bilevel_and_greyscale_images_become_rgb(tmp_path, mode):
    image = Image.fromarray(noise((20, 30))).convert(mode)
    rgb, _ = read_pixels(save_image(tmp_path / "a.png", image))
    assert np.array_equal(rgb, np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    grey = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    rgb, _ = read_pixels(save_image(tmp_path / "a.png", Image.fromarray(grey)))
    assert np.abs(rgb[..., 1].astype(float) - grey / 257).max() <= 0.5
    assert (rgb.min(), rgb.max()) == (0, 255)


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("RGB", (40, 24), (200, 30, 90)).convert("CMYK")
    rgb, _ = read_pixels(save_image(tmp_path / "a.jpg", image, quality=95))
    assert np.abs(rgb.reshape(-1, 3).mean(0) - (200, 30, 90)).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_images_are_rotated_upright(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    kwargs = {"lossless": True} if ending == "webp" else {}
    original = Image.fromarray(noise((20, 30, 3)))
    path = save_image(tmp_path / f"a.{ending}", original, exif=exif, **kwargs)
    rgb, _ = read_pixels(path)
    original.getexif()[0x0112] = orientation
    assert np.array_equal(rgb, np.asarray(ImageOps.exif_transpose(original)))
    assert (rgb.shape[1], rgb.shape[0]) == read_size(path)


def test_a_truncated_image_is_refused_by_name(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        path = write_image(tmp_path / name, (90, 90))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=name):
            read_pixels(str(path))


def test_pixels_can_be_read_from_bytes():
    buffer = io.BytesIO()
    Image.fromarray(noise((8, 9, 3))).save(buffer, "png")
    assert np.array_equal(read_pixels("not there.png", buffer.getvalue())[0], noise((8, 9, 3)))


# Resizing


def test_downscaling_averages_areas():
    pixels = noise((64, 96, 3))
    means = pixels.reshape(16, 4, 24, 4, 3).astype(float).mean((1, 3))
    assert np.abs(resize(pixels, (24, 16), None) - means).max() <= 0.5 + 1e-9


def test_upscaling_uses_lanczos_even_if_one_side_shrinks():
    pixels = noise((40, 40, 3))
    for target in ((80, 80), (80, 20)):
        expected = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))
        assert np.array_equal(resize(pixels, target, None), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nearest", cv2.INTER_NEAREST_EXACT),
        ("bilinear", cv2.INTER_LINEAR),
        ("linear", cv2.INTER_LINEAR),
        ("bicubic", cv2.INTER_CUBIC),
        ("cubic", cv2.INTER_CUBIC),
        ("area", cv2.INTER_AREA),
    ],
)
def test_named_filters_match_opencv(name, kind):
    pixels = noise((40, 56, 3))
    assert np.array_equal(resize(pixels, (90, 30), name), cv2.resize(pixels, (90, 30), interpolation=kind))


def test_the_box_filter_matches_pillow():
    pixels = noise((40, 56, 3))
    expected = np.asarray(Image.fromarray(pixels).resize((30, 22), Image.Resampling.BOX))
    assert np.array_equal(resize(pixels, (30, 22), "box"), expected)


# Cropping


def test_centre_crops_may_be_mirrored():
    pixels = noise((20, 31, 3))
    shape = Shape(bucket=(16, 20), resized=(31, 20))
    assert np.array_equal(apply_placement(pixels, crop_at_centre(shape), None), pixels[:, 7:23])
    mirrored = apply_placement(pixels, crop_at_centre(shape, is_flipped=True), None)
    assert np.array_equal(mirrored, pixels[:, 7:23][:, ::-1])


def test_random_crops_reach_both_edges_and_stay_inside():
    shape = Shape(bucket=(16, 16), resized=(19, 16))
    lefts = {crop_at_random(shape, random.Random(seed)).left for seed in range(100)}
    assert lefts == {0, 1, 2, 3}
    assert {crop_at_random(shape, random.Random(seed)).top for seed in range(20)} == {0}


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_10_20_30_40.png", Face(10, 20, 30, 40)),
        ("a_1_2_3.png", None),
        ("a_b_c_d_e.png", None),
        ("a_1_2_0_0.png", None),
    ],
)
def test_faces_are_parsed_from_file_names(name, face):
    assert parse_face(f"/some_1_2_3_4/{name}") == face


@pytest.mark.parametrize("wanders", [False, True])
def test_face_crops_show_the_face_at_a_size_within_the_range(wanders):
    face, target = Face(600, 300, 100, 80), (128, 192)
    for seed in range(50):
        placement = crop_at_face((1200, 800), target, face, (1.0, 2.0), wanders, random.Random(seed))
        scale = placement.resized[0] / 1200
        shorter_per_face = 128 / (100 * scale)
        assert 0.98 < shorter_per_face < 2.02
        assert 0 <= placement.left <= placement.resized[0] - 128 and 0 <= placement.top <= placement.resized[1] - 192
        if not wanders:
            assert abs(600 * scale - (placement.left + 64)) <= 100 * scale / 20 + 1


def test_a_fixed_face_range_does_not_move_the_crop():
    crops = {
        crop_at_face((1200, 800), (128, 128), Face(600, 300, 90, 80), (1.5, 1.5), False, random.Random(s))
        for s in range(9)
    }
    assert len(crops) == 1


def test_face_crops_of_small_images_cover_the_target():
    placement = crop_at_face((100, 60), (128, 128), Face(50, 30, 10, 10), (1.0, 3.0), False, random.Random(0))
    assert placement.resized[0] >= 128 and placement.resized[1] >= 128


# Colour


@pytest.mark.parametrize("gamma", [0.95, 1.0, 1.05])
def test_gamma_keeps_black_and_white(gamma):
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2)
    changed = apply_gamma(ramp, gamma)
    expected = 255 * (np.arange(256) / 255) ** gamma
    assert np.abs(changed[0, :, 0] - expected).max() <= 0.5 and changed[0, 255, 0] == 255


def test_hue_shifts_keep_brightness_and_greys():
    red = np.full((2, 2, 3), (200, 40, 40), dtype=np.uint8)
    turned = turn_hue(red, 8)
    hsv = cv2.cvtColor(turned, cv2.COLOR_RGB2HSV)[0, 0]
    assert hsv[0] == 8 and turned.max() == 200 and turned.min() == 40
    assert cv2.cvtColor(turn_hue(red, -8), cv2.COLOR_RGB2HSV)[0, 0, 0] == 172
    grey = np.full((2, 2, 3), 77, dtype=np.uint8)
    assert np.array_equal(turn_hue(grey, 5), grey)


def test_about_a_third_of_the_draws_change_colours():
    pixels = noise((8, 8, 3))
    changed = sum(not np.array_equal(change_colour(pixels, random.Random(seed)), pixels) for seed in range(2000))
    assert 0.28 < changed / 2000 < 0.36


def test_equal_placements_compare_equal():
    assert Placement((8, 8), 0, 0, (8, 8)) == Placement((8, 8), 0, 0, (8, 8), False)


@pytest.mark.parametrize("name", ["brightness_aug", "contrast_aug", "saturation_aug"])
def test_brightness_contrast_and_saturation_are_multiplied(name: str) -> None:
    """Recomputed in float64: a mixture with black, with the mean grey, or with each pixel's own grey (ITU-R 601)."""
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    largest = dict.fromkeys(("brightness_aug", "contrast_aug", "saturation_aug"), 0.0) | {name: 0.4}
    factors = []
    for seed in range(20):
        changed = change_light(pixels, largest, random.Random(seed))
        factors.append(1 + random.Random(seed).uniform(-0.4, 0.4))
        rgb = pixels[..., :3].astype(np.float64)
        grey_HW = rgb @ [0.299, 0.587, 0.114]
        toward = {"brightness_aug": 0.0, "contrast_aug": grey_HW.mean(), "saturation_aug": grey_HW[..., None]}[name]
        expected = np.clip(toward + factors[-1] * (rgb - toward), 0, 255)
        assert np.abs(changed[..., :3] - expected).max() <= 2
        assert (changed[..., 3] == pixels[..., 3]).all()
    assert min(factors) < 0.8 and max(factors) > 1.2
