"""The edits of the toy world, their checker, and the VAE of the toy edit model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.toys import check_edits, make_pairs
from benchmarks.toys.make_toy_base import to_tensor
from benchmarks.toys.make_toy_edit_base import KNOWN_EDITS, SCALING_FACTOR, TOY_BASE, draw_edits, make_vae
from library.models.vae.flux import map_latents
from tools.quickstart.toy_world import draw_scene, list_scenes, look_at

pytestmark = pytest.mark.slow
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
