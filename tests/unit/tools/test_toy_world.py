"""The toy world, its edits and pairs, and the checkers that read them back from the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.toys import check_edits, make_pairs
from benchmarks.toys.make_toy_base import to_tensor
from benchmarks.toys.make_toy_edit_base import KNOWN_EDITS, SCALING_FACTOR, TOY_BASE, draw_edits, make_vae
from library.models.vae.flux import map_latents
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


# The edits of the toy world, their checker, and the VAE of the toy edit model.

INSTRUCTION = "make the shape red"


def test_known_edits_change_no_shape_and_pairs_change_nothing_else(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--words", "red", "other", "--count", "12", "--caption", INSTRUCTION]
    assert make_pairs.main(words) == 0
    for path in sorted((tmp_path / "red").glob("*.png")):
        edited, reference = check_edits.read_image(path), check_edits.read_image(tmp_path / "other" / path.name)
        moved = np.roll(edited, 32, axis=0)
        right = [all(check_edits.judge(image, edited).values()) for image in (edited, reference, moved)]
        assert right == [True, False, False]
        assert path.with_suffix(".txt").read_text() == INSTRUCTION + "\n"
    for make in KNOWN_EDITS:
        for edit in draw_edits(make, 20, seed=3):
            before, after = look_at(edit.draw(edit.before)), look_at(edit.draw(edit.after))
            assert before.shows(edit.before) and after.shows(edit.after) and edit.instruction != INSTRUCTION
            assert (before.shape, before.colour) == (after.shape, after.colour)


def test_results_without_images_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--references", str(tmp_path), "--results", str(tmp_path), "--output", str(tmp_path / "out")]
    assert check_edits.main(words) == 1
    assert "make_pairs.py" in capsys.readouterr().err
    (tmp_path / "7.png").touch()
    assert check_edits.main([*words[:1], str(tmp_path / "none"), *words[2:]]) == 1
    assert "none lacks 7.png" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_vae_of_16_channels_is_the_quickstarts() -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(str(TOY_BASE / "vae")).float()
    codec, vae = map_latents("_x.npz"), make_vae()
    pixels = to_tensor([draw_scene(scene, np.random.default_rng(4)) for scene in list_scenes()[:3]])
    with torch.no_grad():
        latents = codec.encode(vae, pixels, None)
        expected = theirs.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, expected.repeat_interleave(4, 1) * SCALING_FACTOR, rtol=1e-4, atol=1e-4)
        images = codec.decode(vae, latents)
        torch.testing.assert_close(images, theirs.decode(expected).sample, rtol=1e-3, atol=1e-4)


# Pairs of toy images differ in one word, which their captions omit or name along with the other.


@pytest.mark.parametrize(
    ("words", "attribute"), [(("blue", "red"), "colour"), (("blue", "other"), "colour"), (("large", "small"), "size")]
)
def test_pairs_differ_in_one_word(words: tuple[str, str], attribute: str, tmp_path: Path) -> None:
    assert make_pairs.main(["--out", str(tmp_path), "--words", *words, "--count", "12"]) == 0
    scenes = [[look_at(np.asarray(Image.open(tmp_path / word / f"{n:03}.png"))) for n in range(12)] for word in words]
    for first, second in zip(*scenes, strict=True):
        assert getattr(first, attribute) == words[0] != getattr(second, attribute)
        assert (first.shape, first.background) == (second.shape, second.background)
    others = {getattr(scene, attribute) for scene in scenes[1]}
    assert len(others) == 6 if words[1] == "other" else others == {words[1]}
    captions = [path.read_text() for path in sorted((tmp_path / words[0]).glob("*.txt"))]
    assert len(captions) == 12 and not any(word in caption for word in words for caption in captions)
    assert captions[0].startswith("a ") and not list((tmp_path / words[1]).glob("*.txt"))


@pytest.mark.parametrize("other", ["red", "other"])
def test_captions_can_name_both_words_of_their_pair(other: str, tmp_path: Path) -> None:
    words = ["--words", "blue", other, "--name_both", "--count", "6"]
    assert make_pairs.main(["--out", str(tmp_path), *words]) == 0
    for number in range(6):
        opposite = look_at(np.asarray(Image.open(tmp_path / other / f"{number:03}.png"))).colour
        assert f" blue or {opposite} " in (tmp_path / "blue" / f"{number:03}.txt").read_text()


@pytest.mark.parametrize("words", [("blue", "large"), ("blue", "blue"), ("other", "blue")])
def test_words_that_do_not_form_a_pair_are_refused(words: tuple[str, str], tmp_path: Path) -> None:
    assert make_pairs.main(["--out", str(tmp_path), "--words", *words]) == 1
    assert not list(tmp_path.iterdir())
