"""Words that preview prompts expect the adapter to know, and that no caption teaches."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from library.data.plan.data_plan import DataPlan

WORD = re.compile(r"[^\W\d_][\w'-]+")
# Words that every base model knows and that captions of tags leave out.
COMMON = frozenset((
    "an", "the", "and", "of", "in", "on", "at", "with", "from", "by", "for", "to", "is", "are",
    "photo", "photograph", "picture", "image", "painting", "drawing", "illustration", "portrait", "close-up",
    "masterpiece", "best", "high", "quality", "detailed",
))  # fmt: skip


def find_untaught_words(
    prompts: Iterable[str], captions: Iterable[str], count_tokens: Callable[[str], int]
) -> list[str]:
    """Return the words that all prompts have and no caption contains.

    A single prompt has many words that need no caption; of these only made-up ones are returned, for which the text
    encoder has no token of their own.
    """
    texts = list(dict.fromkeys(text.lower() for text in prompts))
    shared = [word for word in dict.fromkeys(WORD.findall(texts[0])) if word not in COMMON] if texts else []
    words = [word for word in shared if all(word in WORD.findall(text) for text in texts)]
    if len(texts) == 1:
        num_marks = count_tokens("")  # of start and end
        words = [word for word in words if count_tokens(word) - num_marks > 1]
    for caption in captions:
        if not words:
            break
        lowered = caption.lower()
        words = [word for word in words if word not in lowered]
    return words


def caption_texts(plan: DataPlan) -> Iterator[str]:
    """Yield every text that captions of training images may contain, without regularisation images."""
    for subset in (subset for dataset in plan.datasets for subset in dataset.subsets if not subset.config.is_reg):
        rules = subset.config.captions
        added = rules.caption_prefix, rules.caption_suffix, rules.trigger_word, subset.config.class_tokens
        yield " ".join(filter(None, added))
        yield from subset.images.captions
        yield from subset.images.tags or ()


def describe_untaught(words: Sequence[str]) -> str:
    """Return the warning about words of `find_untaught_words`."""
    quoted = " and ".join(repr(word) for word in words)
    they = "it means" if len(words) == 1 else "they mean"
    return (
        f"--sample_prompts: every prompt has {quoted}, and no caption, caption_prefix or class_tokens has: the adapter "
        f"cannot learn what {they}; add what captions lack with caption_prefix, or write prompts with their words"
    )
