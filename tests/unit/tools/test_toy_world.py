"""The toy world draws what its captions say, and the checker reads it back from the pixels."""

import numpy as np
import pytest
from PIL import Image

from tools.quickstart.toy_world import (
    CAPTION_TEMPLATES,
    HELD_OUT_SHAPES,
    KNOWN_SHAPES,
    ImageArray,
    Scene,
    Style,
    draw_doodle,
    draw_scene,
    list_scenes,
    look_at,
    parse_caption,
)

pytestmark = pytest.mark.slow

ALL_SHAPES = KNOWN_SHAPES + HELD_OUT_SHAPES


def share_read_back(scenes: list[Scene], seed: int) -> float:
    rng = np.random.default_rng(seed)
    return float(np.mean([look_at(draw_scene(scene, rng)).shows(scene) for scene in scenes]))


def blurred(image: ImageArray) -> ImageArray:
    """Lose detail as a VAE does: halve the resolution and scale back."""
    original = Image.fromarray(image)
    return np.asarray(original.resize((32, 32), Image.Resampling.BOX).resize(original.size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_checker_reads_back_98_of_100_drawn_images(shape: str) -> None:
    assert share_read_back(4 * list_scenes((shape,)), seed=1) >= 0.98


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_checker_tells_an_outlined_shape_from_a_solid_one(shape: str) -> None:
    assert share_read_back(list_scenes((shape,), "outlined"), seed=2) >= 0.98


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_checker_reads_blurred_images(shape: str) -> None:
    rng = np.random.default_rng(3)
    scenes = list_scenes((shape,))
    assert np.mean([look_at(blurred(draw_scene(scene, rng))).shows(scene) for scene in scenes]) >= 0.95


def test_checker_names_the_size_too() -> None:
    rng = np.random.default_rng(4)
    scenes = list_scenes(ALL_SHAPES)
    assert np.mean([look_at(draw_scene(scene, rng)).size == scene.size for scene in scenes]) >= 0.98


def test_checker_finds_nothing_in_a_blank_image() -> None:
    scene = look_at(np.full((64, 64, 3), 246, dtype=np.uint8))
    assert (scene.shape, scene.colour, scene.background) == ("", "", "white")


@pytest.mark.parametrize("deviation", [30, 60, 90])
def test_checker_finds_no_shape_in_noise(deviation: float) -> None:
    rng = np.random.default_rng(5)
    images = [np.clip(rng.normal(128, deviation, (64, 64, 3)), 0, 255).astype(np.uint8) for _ in range(40)]
    assert not any(look_at(image).shape for image in images)


def test_checker_finds_no_shape_in_two() -> None:
    left, right = (draw_scene(Scene("square", "red", "white", "small"), np.random.default_rng(6)) for _ in range(2))
    both = np.minimum(np.roll(left, -16, axis=1), np.roll(right, 16, axis=1))
    assert look_at(both).shape == ""


def test_checker_finds_no_unseen_shape_in_doodles() -> None:
    rng = np.random.default_rng(7)
    shapes = [look_at(draw_doodle(rng)).shape for _ in range(200)]
    assert sum(shape in HELD_OUT_SHAPES for shape in shapes) <= 2


def test_checker_needs_every_word_to_be_right() -> None:
    scene = Scene("circle", "red", "white", "large")
    recognised = look_at(draw_scene(scene, np.random.default_rng(8)))
    assert recognised.shows(scene)
    for wrong in (
        Scene("square", "red", "white", "large"),
        Scene("circle", "blue", "white", "large"),
        Scene("circle", "red", "black", "large"),
        Scene("circle", "red", "white", "large", "outlined"),
    ):
        assert not recognised.shows(wrong)


@pytest.mark.parametrize("style", ["solid", "outlined"])
@pytest.mark.parametrize("template", CAPTION_TEMPLATES)
def test_captions_match_the_drawn_scene(template: str, style: Style) -> None:
    for scene in list_scenes(ALL_SHAPES, style):
        parsed = parse_caption(scene.caption(template))
        assert (parsed.shape, parsed.colour, parsed.background) == (scene.shape, scene.colour, scene.background)
        assert parsed.style == style
        assert parsed.size in (scene.size, "")


def test_a_caption_that_does_not_parse_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not describe a scene of the toy world"):
        parse_caption("a photo of a cat")


def test_the_same_seed_draws_the_same_image() -> None:
    scene = list_scenes()[0]
    first, second = (draw_scene(scene, np.random.default_rng(9)) for _ in range(2))
    assert (first == second).all()
    assert (first != draw_scene(scene, np.random.default_rng(10))).any()


def test_known_scenes_exclude_held_out_combinations() -> None:
    assert len(list_scenes()) == 210
    assert not {scene.shape for scene in list_scenes()} & set(HELD_OUT_SHAPES)
    assert {scene.style for scene in list_scenes()} == {"solid"}
