"""Composition of the caption of a draw from the text of an image."""

import math
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from library.base.randomness import random_for
from library.data.description.keys import COUNT, NUMBER, SEPARATOR, key, key_of_option
from library.options.kinds import BOOL, SHARE, TEXT


@dataclass(frozen=True)
class CaptionRules:
    """The changes of a caption for each draw. The fields are keys of the dataset file."""

    shuffle_caption: bool = key_of_option(BOOL, False)
    caption_separator: str = key_of_option(SEPARATOR, ",")
    keep_tokens: int = key_of_option(COUNT, 0)
    keep_tokens_separator: str = key_of_option(TEXT, "")
    secondary_separator: str | None = key_of_option(TEXT, None)
    enable_wildcard: bool = key_of_option(BOOL, False)
    enable_multiline_caption: bool = key(BOOL, False)
    """Use the whole caption file with its line breaks, not its first line."""
    caption_prefix: str | None = key_of_option(TEXT, None)
    caption_suffix: str | None = key_of_option(TEXT, None)
    trigger_word: str | None = key(TEXT, None)
    """Words put before captions that lack them as words, in any case."""
    caption_dropout_rate: float = key_of_option(SHARE, 0.0)
    caption_dropout_every_n_epochs: int = key_of_option(COUNT, 0)
    caption_tag_dropout_rate: float = key_of_option(SHARE, 0.0)
    token_warmup_min: int = key_of_option(COUNT, 1)
    token_warmup_step: float = key_of_option(NUMBER, 0.0)  # steps, or a share of the run if below 1
    fixed: str | None = None  # in place of the caption and all changes but dropout; no key of its own

    @property
    def moves_tags(self) -> bool:
        """True if tags are shuffled, dropped or held back by warm-up."""
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0

    @property
    def varies(self) -> bool:
        """True if different draws of an image can have different captions, apart from the empty prompt."""
        return self.fixed is None and (self.moves_tags or self.enable_wildcard)


def find_idle_rules(rules: CaptionRules, occurs: Callable[[str], bool]) -> Iterator[str]:
    """Yield a line for each key that changes no caption; `occurs` tells whether a text is in one of them."""

    def is_in_captions(sign: str) -> bool:
        return sign in f"{rules.caption_prefix or ''} {rules.caption_suffix or ''}" or occurs(sign)

    where = "no caption has"
    if rules.keep_tokens and not rules.moves_tags:
        yield "keep_tokens has no effect: no tag moves without shuffle_caption, token_warmup_step or dropped tags"
    if rules.shuffle_caption and not is_in_captions(rules.caption_separator):
        yield f"shuffle_caption has no effect: {where} the caption_separator {rules.caption_separator!r}"
    for name in ("keep_tokens_separator", "secondary_separator"):
        sign = getattr(rules, name)
        if sign and not is_in_captions(sign):
            yield f"{name} has no effect: {where} {sign!r}"
    if rules.enable_wildcard and not (is_in_captions("{") or occurs("\n")):
        yield f"enable_wildcard has no effect: {where} braces or several lines"


def compose_caption(
    text: str, rules: CaptionRules, rng: random.Random, epoch: int, step: int, max_train_steps: int
) -> str:
    """Compose the caption of a draw: empty if dropped, or a line of `text` with prefix, suffix, wildcards and tag rules
    applied.

    `epoch` counts from 1. `step` is the optimizer step; a `token_warmup_step` below 1 is a share of `max_train_steps`.
    """
    return "" if is_dropped(rules, rng, epoch) else arrange_caption(text, rules, rng, step, max_train_steps)


def is_dropped(rules: CaptionRules, rng: random.Random, epoch: int) -> bool:
    """Return True if the draw gets the empty prompt in place of its caption."""
    if rules.caption_dropout_rate > 0 and rng.random() < rules.caption_dropout_rate:
        return True
    # Epochs count from 1. sd-scripts calls the first batch's epoch 0, so it always drops that batch's captions.
    return rules.caption_dropout_every_n_epochs > 0 and epoch % rules.caption_dropout_every_n_epochs == 0


def arrange_caption(text: str, rules: CaptionRules, rng: random.Random, step: int, max_train_steps: int) -> str:
    """Compose a caption from a line of `text` with prefix, suffix, wildcards and tag rules, without caption dropout."""
    if rules.fixed is not None:
        return rules.fixed
    lines = caption_lines(text, rules)
    # The drawn line gets both affixes: sd-scripts adds the prefix to the first line and the suffix to the last one.
    # They precede the wildcards, so that they may contain some.
    caption = with_affixes(rng.choice(lines) if len(lines) > 1 else lines[0], rules)
    if rules.enable_wildcard:
        caption = replace_wildcards(caption, rng)
    caption = with_trigger(caption, rules)
    # A marker is removed even if no tag moves; sd-scripts then leaves it in the prompt.
    has_marker = bool(rules.keep_tokens_separator) and rules.keep_tokens_separator in caption
    if has_marker or rules.moves_tags:
        head, movable, tail = split_tags(caption, rules)
        # Before the shuffle, so that warm-up adds tags in the order of the file.
        movable = warm_up_tags(movable, rules, step, max_train_steps)
        if rules.shuffle_caption:
            rng.shuffle(movable)
        if rules.caption_tag_dropout_rate > 0:
            movable = [tag for tag in movable if rng.random() >= rules.caption_tag_dropout_rate]
        # As sd-scripts since 0.11; before, a comma and a space joined the tags whatever the separator was.
        caption = f"{rules.caption_separator} ".join(head + movable + tail)
    # Replaced last, so that the tags it joins move and drop together.
    if rules.secondary_separator:
        caption = caption.replace(rules.secondary_separator, rules.caption_separator)
    return caption


def caption_variant(image: str, text: str, rules: CaptionRules, variant: int) -> str:
    """Return one of the variants of a caption that are encoded before training; a function of the image's name and
    folder.

    The variants do not depend on the run's seed, so that other runs can reuse them. The seed only decides which variant
    a draw uses. Tag warm-up is not supported, because it changes captions in every step.
    """
    # Only the folder's name and the stem count, so a moved dataset and an image saved in another format keep their
    # variants.
    folder, name = os.path.split(os.path.abspath(image))
    names = ascii(os.path.basename(folder)), ascii(os.path.splitext(name)[0])  # names may hold bytes that are not text
    return arrange_caption(text, rules, random_for(0, "caption variant", *names, variant), 0, 0)


def caption_lines(text: str, rules: CaptionRules) -> list[str]:
    """Return the texts to draw from, at least one: the whole text with enable_multiline_caption, all non-blank lines
    with enable_wildcard, else the first line."""
    if rules.enable_multiline_caption:
        return [text]
    lines = text.split("\n")
    if not rules.enable_wildcard:
        return lines[:1]
    return [line for line in lines if line.strip()] or [""]


def with_affixes(line: str, rules: CaptionRules) -> str:
    """Add caption_prefix and caption_suffix to a line."""
    if rules.caption_prefix:
        line = f"{rules.caption_prefix} {line}"
    if rules.caption_suffix:
        line = f"{line} {rules.caption_suffix}"
    return line


def with_trigger(caption: str, rules: CaptionRules) -> str:
    """Put the trigger word before a caption that lacks it."""
    if not rules.trigger_word or has_word(caption, rules.trigger_word):
        return caption
    return f"{rules.trigger_word}{rules.caption_separator} {caption}" if caption else rules.trigger_word


def has_word(caption: str, word: str) -> bool:
    """Return True if a caption has a word or several, in any case, and not as part of a longer word."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) is not None


_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def replace_wildcards(caption: str, rng: random.Random) -> str:
    """Replace `{a|b}` by one of its alternatives, and `{{`, `}}` by literal braces; keep `{}`. Braces do not nest."""

    def choose_alternative(match: re.Match[str]) -> str:
        if match[1] is None:
            return "{" if match[0] == "{{" else "}"
        alternatives: list[str] = match[1].split("|")
        return rng.choice(alternatives)

    return _WILDCARD.sub(choose_alternative, caption)


def has_nested_wildcard(caption: str) -> bool:
    """Return True if a `{...}` is inside another, which `replace_wildcards` does not support."""
    depth = 0
    for brace in re.findall(r"\{\{|\}\}|\{|\}", caption):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth > 1:
            return True
        depth = max(depth, 0)
    return False


def split_tags(caption: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """Split a caption into (head, movable, tail) tags; head and tail are fixed.

    If keep_tokens_separator occurs, it marks the parts, and blank tags are removed. Otherwise the first keep_tokens
    tags are the head, and blank tags stay.
    """
    separator, marker = rules.caption_separator, rules.keep_tokens_separator
    if marker and marker in caption:
        head, movable, *tail_parts = caption.split(marker, 2)
        tail_text = "".join(tail_parts).replace(marker, separator)  # further markers are not part of the text
        parts = [[tag.strip() for tag in part.split(separator) if tag.strip()] for part in (head, movable, tail_text)]
        return parts[0], parts[1], parts[2]
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []


def warm_up_tags(tags: list[str], rules: CaptionRules, step: int, max_train_steps: int) -> list[str]:
    """Return the first tags, growing from token_warmup_min at step 0 to all of them at token_warmup_step."""
    warmup = rules.token_warmup_step
    if 0 < warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if warmup <= 0 or step >= warmup:
        return list(tags)
    smallest = rules.token_warmup_min
    return tags[: math.floor(step * (len(tags) - smallest) / warmup) + smallest]


def iterate_fullest_captions(text: str, rules: CaptionRules) -> Iterator[str]:
    """Yield every line with affixes and all of its tags, for the check of the token limit."""
    if rules.fixed is not None:
        yield rules.fixed
        return
    for line in caption_lines(text, rules):
        caption = with_trigger(with_affixes(line, rules), rules)
        if rules.keep_tokens_separator:
            caption = caption.replace(rules.keep_tokens_separator, rules.caption_separator)
        if rules.secondary_separator:
            caption = caption.replace(rules.secondary_separator, rules.caption_separator)
        yield caption
