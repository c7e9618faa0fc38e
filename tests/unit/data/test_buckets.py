"""Bucket sizes and the assignment of images to buckets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.base.errors import UserError
from library.data.description.buckets import BucketRules, ReferenceRules, Shape, assign_shapes, bucket_sizes, crop_ltrb


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
