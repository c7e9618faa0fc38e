"""Words that preview prompts have and no caption teaches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from library.checkpoints.marks import TRAIN_PY, seal_text
from library.training.evaluation.untaught_words import caption_texts, find_untaught_words
from library.training.run import wanted_previews
from tests.unit.data.builders import plan_of, write_config, write_folder

VOCABULARY = {"a", "photo", "of", "cat", "dog", "beach"}


def count_tokens(text: str) -> int:
    """Count the marks of start and end, and two tokens for a word outside the vocabulary."""
    return 2 + sum(1 if word in VOCABULARY else 2 for word in text.split())


@pytest.mark.parametrize(
    ("prompts", "captions", "words"),
    [
        (["a photo of mycat, beach", "Mycat asleep"], ["a cat on grass"], ["mycat"]),
        (["a photo of mycat", "mycat asleep"], ["a cat", "MyCat on grass"], []),
        (["a photo of the cat", "the cat asleep"], ["tabby"], ["cat"]),  # "the" is common
        (["a cat", "a dog"], ["tabby"], []),  # no word is in both
        (["mycat at the beach"], ["a cat"], ["mycat"]),  # "beach" needs no caption
        (["mycat at the beach"], ["photo of mycats"], []),
        (["a mycat", "a mycat"], [], ["mycat"]),  # one prompt twice
        ([], ["a cat"], []),
    ],
)
def test_words_of_all_prompts_that_no_caption_has(prompts, captions, words):
    assert find_untaught_words(prompts, captions, count_tokens) == words


def test_prefix_and_class_tokens_count_as_captions_and_regularisation_images_do_not(tmp_path):
    for name in ("own", "reg"):
        write_folder(tmp_path / name, 1, caption=name)
    text = (
        "[[datasets]]\nresolution = 64\ncaption_prefix = 'ohwx'\ncaption_extension = '.txt'\n"
        "[[datasets.subsets]]\nimage_dir = '{here}/own'\nclass_tokens = 'a tabby'\n"
        "[[datasets.subsets]]\nimage_dir = '{here}/reg'\nis_reg = true\n"
    )
    texts = [*caption_texts(plan_of(write_config(tmp_path / "data.toml", text)))]
    assert texts == ["ohwx a tabby", "own 0"]


@pytest.mark.parametrize(
    ("text", "is_judged"),
    [
        (seal_text(TRAIN_PY, "mycat, a cat\n"), False),
        (seal_text(TRAIN_PY, "mycat, a cat\n") + "a word of mine\n", True),
        ("mycat, a cat\n", True),
    ],
)
def test_only_words_of_the_user_are_judged(
    text: str, is_judged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Any] = []
    for name, value in {
        "read_wanted_prompts": lambda options, arch: ["a prompt"],
        "to_meta_device": lambda load: SimpleNamespace(vae=lambda: None),
        "collect_texts": lambda prompts, arch: [],
        "read_scorer": lambda options, plan: None,
        "warn_of_untaught_words": lambda *arguments: judged.append(arguments),
    }.items():
        monkeypatch.setattr(wanted_previews, name, value)
    (tmp_path / "prompts.txt").write_text(text)
    options: Any = SimpleNamespace(sample_prompts=str(tmp_path / "prompts.txt"))
    thing: Any = SimpleNamespace(load=None, image_plan=None)
    wanted_previews.read_wanted_previews(options, thing, thing)
    assert bool(judged) == is_judged
