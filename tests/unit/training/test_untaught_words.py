"""Words that preview prompts have and no caption teaches."""

import pytest

from library.training.evaluation.untaught_words import caption_texts, find_untaught_words
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
