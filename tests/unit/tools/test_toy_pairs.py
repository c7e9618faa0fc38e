"""Pairs of toy images differ in one word, which their captions omit or name along with the other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.toys import make_pairs
from tools.quickstart.toy_world import look_at

pytestmark = pytest.mark.slow


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
