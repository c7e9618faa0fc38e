"""Composition and encodings of captions."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.base.errors import UserError
from library.data.description.captions import (
    CaptionRules,
    compose_caption,
    has_nested_wildcard,
    iterate_fullest_captions,
    replace_wildcards,
    split_tags,
)
from library.data.description.dataset_file import load_dataset_config
from library.data.plan.collect import collect
from library.options.config_file import read_toml
from library.options.encodings import likely_encoding
from library.options.output.prompts import read_prompts
from tests.unit.data.builders import write_config, write_folder


def compose(
    text: str, epoch: int = 1, step: int = 0, seed: int = 0, max_train_steps: int = 100, **rules: object
) -> str:
    return compose_caption(text, CaptionRules(**rules), random.Random(seed), epoch, step, max_train_steps)  # type: ignore[arg-type]


def compose_many(text: str, times: int = 200, **rules: object) -> set[str]:
    return {compose(text, seed=seed, **rules) for seed in range(times)}


def test_the_keep_tokens_separator_never_reaches_the_prompt():
    assert compose("a, b ||| c, d ||| e", keep_tokens_separator="|||") == "a, b, c, d, e"
    assert compose("a ||| b ||| c ||| d", keep_tokens_separator="|||") == "a, b, c, d"


def test_only_tags_between_keep_tokens_separators_are_shuffled_and_blanks_removed():
    prompts = compose_many("a, b ||| c, d,, x ||| e", keep_tokens_separator="|||", shuffle_caption=True)
    assert len(prompts) == 6
    assert all(p.startswith("a, b, ") and p.endswith(", e") for p in prompts)
    assert all(sorted(p.split(", ")) == ["a", "b", "c", "d", "e", "x"] for p in prompts)


def test_blank_tags_are_kept_with_keep_tokens():
    prompts = compose_many("a,b,,c", shuffle_caption=True, keep_tokens=1)
    assert "a, c, , b" in prompts
    assert len(prompts) == 6 and all(p.startswith("a, ") for p in prompts)


def test_tags_are_joined_by_commas_whatever_their_separator():
    assert "a; b; c" in compose_many("a;b;c", shuffle_caption=True, caption_separator=";")


def test_the_secondary_separator_becomes_the_separator():
    assert compose("a, x;;;y;;;z, b", secondary_separator=";;;") == "a, x,y,z, b"


def test_tags_joined_by_the_secondary_separator_move_together():
    assert all("x,y" in p for p in compose_many("a, x;;;y, b", secondary_separator=";;;", shuffle_caption=True))


def test_without_wildcards_the_first_line_is_used_between_prefix_and_suffix():
    assert compose("l1\nl2", caption_prefix="P", caption_suffix="S") == "P l1 S"
    assert compose("l1\nl2", caption_prefix="P") == "P l1"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", "sks, a cat"),
        ("a SKS cat", "a SKS cat"),
        ("asks a cat", "sks, asks a cat"),
        ("skse a cat", "sks, skse a cat"),
        ("", "sks"),
        ("a cat\nsks", "sks, a cat"),
    ],
)
def test_the_trigger_word_is_put_before_a_caption_that_lacks_it_as_a_word(caption: str, expected: str) -> None:
    assert compose(caption, trigger_word="sks") == expected


def test_the_trigger_word_is_not_added_to_what_a_prefix_or_a_wildcard_brings() -> None:
    assert compose("a cat", trigger_word="sks", caption_prefix="photo of sks,") == "photo of sks, a cat"
    assert compose_many("{a sks|a} cat", trigger_word="sks", enable_wildcard=True) == {"a sks cat", "sks, a cat"}


def test_every_line_gets_the_prefix_and_suffix():
    lines = compose_many("l1\n\nl2\nl3", enable_wildcard=True, caption_prefix="P", caption_suffix="S")
    assert lines == {"P l1 S", "P l2 S", "P l3 S"}


def test_a_multiline_caption_is_drawn_whole_with_one_prefix_and_its_wildcards():
    assert compose_many("l1\nl2", enable_multiline_caption=True, caption_prefix="P", caption_suffix="S") == {
        "P l1\nl2 S"
    }
    assert compose_many("a {b|c}\nd", enable_multiline_caption=True, enable_wildcard=True) == {"a b\nd", "a c\nd"}


def test_prefix_and_suffix_drop_with_the_tags_they_join_unless_they_are_kept():
    assert compose("a, b", caption_prefix="P", caption_suffix="S", caption_tag_dropout_rate=1.0) == ""
    kept = {"caption_prefix": "P |||", "caption_suffix": "||| S", "keep_tokens_separator": "|||"}
    assert compose("a, b", **kept, caption_tag_dropout_rate=1.0) == "P, S"
    assert compose("a, b", caption_prefix="P", keep_tokens=1, caption_tag_dropout_rate=1.0) == "P a"


@pytest.mark.parametrize(("step", "count"), [(0, 1), (1, 1), (5, 3), (9, 5), (10, 6), (50, 6)])
def test_tag_warm_up_adds_one_tag_after_another(step, count):
    assert compose("a,b,c,d,e,f", step=step, token_warmup_step=0.1) == ", ".join("abcdef"[:count])


def test_tag_warm_up_starts_at_token_warmup_min():
    assert compose("a,b,c,d,e,f", step=5, token_warmup_step=10, token_warmup_min=2) == "a, b, c, d"


@pytest.mark.parametrize(("epoch", "is_dropped"), [(0, True), (1, False), (2, True), (3, False), (4, True)])
def test_captions_are_dropped_in_every_second_epoch(epoch, is_dropped):
    assert (compose("a, b", epoch=epoch, caption_dropout_every_n_epochs=2) == "") == is_dropped


def test_captions_are_dropped_at_their_rate():
    dropped = sum(compose("a", seed=seed, caption_dropout_rate=0.3) == "" for seed in range(4000))
    assert 0.27 < dropped / 4000 < 0.33


def test_tags_except_kept_ones_are_dropped_at_their_rate():
    prompts = [compose("k, b, c", seed=s, keep_tokens=1, caption_tag_dropout_rate=0.25) for s in range(4000)]
    assert all(p.startswith("k") for p in prompts)
    assert 0.22 < sum("b" not in p for p in prompts) / 4000 < 0.28


def test_wildcards_choose_among_all_alternatives():
    assert compose_many("{red|green|blue} hat", enable_wildcard=True) == {"red hat", "green hat", "blue hat"}


def test_braces_are_plain_text_without_wildcards():
    assert compose("{a|b} {{c}}") == "{a|b} {{c}}"


@pytest.mark.parametrize(
    ("text", "result"),
    [("{{a|b}}", "{a|b}"), ("{x}", "x"), ("{}", "{}"), ("{{{x}}}", "{x}"), ("a } b { c", "a } b { c")],
)
def test_braces_without_alternatives_are_unwrapped_or_kept(text, result):
    assert replace_wildcards(text, random.Random(3)) == result


def test_a_prefix_may_hold_wildcards():
    assert compose_many("x", enable_wildcard=True, caption_prefix="{a|b}") == {"a x", "b x"}


def test_nested_braces_are_recognised():
    assert has_nested_wildcard("{a|{b|c}}")
    assert not has_nested_wildcard("{a|b} {c} {{d}}")


def test_the_fullest_caption_has_affixes_and_no_separators():
    rules = CaptionRules(
        enable_wildcard=True, caption_prefix="P", keep_tokens_separator="|||", secondary_separator=";;;"
    )
    assert list(iterate_fullest_captions("a|||b;;;c\nd", rules)) == ["P a,b,c", "P d"]


@given(
    tags=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=8), keep=st.integers(0, 9), seed=st.integers(0, 99)
)
def test_shuffling_keeps_every_tag_and_does_not_move_kept_ones(tags, keep, seed):
    prompt = compose(",".join(tags), seed=seed, shuffle_caption=True, keep_tokens=keep).split(", ")
    assert sorted(prompt) == sorted(tags)
    assert prompt[:keep] == tags[:keep]


@given(st.text(alphabet="ab, |;", max_size=30))
def test_the_parts_of_a_split_caption_contain_no_separator(text):
    parts = split_tags(text, CaptionRules(keep_tokens_separator="||"))
    if "||" in text:
        assert not any("||" in tag or not tag for part in parts for tag in part)


# Errors for text that is not UTF-8 suggest the likely encoding.

CASES = [
    ("猫、座っている、青い空", "cp932", "Shift-JIS"),
    ("a cat in a café", "latin-1", "Latin-1"),
    ("a cat", "utf-16", "UTF-16"),
    ("一个女孩坐在草地上", "gb18030", "GB18030"),
    ("fille blonde, forêt", "latin-1", "Latin-1"),
    ("ein mädchen, größe", "cp1252", "Latin-1"),
    ("niño, cabaña", "latin-1", "Latin-1"),
    ("jeune fille à l’école", "cp1252", "Latin-1"),
    ("девушка сидит на траве", "cp1251", "Cyrillic"),
    ("1girl, 猫耳, 青い空の下で座っている", "cp932", "Shift-JIS"),
    ("소녀가 풀밭에 앉아 있다", "cp949", "EUC-KR"),
]


@pytest.mark.parametrize(("text", "encoding", "name"), CASES)
def test_the_likely_encoding_is_detected(text: str, encoding: str, name: str) -> None:
    assert (likely_encoding(text.encode(encoding)) or "").startswith(name)


def test_all_captions_in_other_encodings_are_listed_at_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 4)
    for number, (text, encoding, _) in enumerate(CASES[:3]):
        (tmp_path / f"a/p{number}.txt").write_bytes(text.encode(encoding))
    subset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\ncaption_extension = '.txt'"
    config = load_dataset_config(write_config(tmp_path / "data.toml", subset))
    with pytest.raises(UserError, match=r"3 caption files .* p0\.txt \(Shift-JIS.*p1\.txt \(Latin-1.*p2\.txt \(UTF-16"):
        collect(config)


def test_captions_of_all_subsets_are_listed_at_once(tmp_path: Path) -> None:
    subsets = "[[datasets]]\nresolution = 64\n"
    for name in "ab":
        write_folder(tmp_path / name, 2)
        (tmp_path / name / "p1.txt").write_bytes("forêt".encode("latin-1"))
        subsets += f"[[datasets.subsets]]\nimage_dir = '{{here}}/{name}'\ncaption_extension = '.txt'\n"
    config = load_dataset_config(write_config(tmp_path / "data.toml", subsets))
    with pytest.raises(UserError, match=r"(?s)a/p1\.txt is not UTF-8.*\n.*b/p1\.txt is not UTF-8"):
        collect(config)


def test_errors_for_toml_and_prompt_files_suggest_the_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes("image_dir = 'bilder/mädchen, größe'".encode("latin-1"))
    with pytest.raises(UserError, match="it looks like Latin-1"):
        read_toml(tmp_path / "a.toml", "--dataset_config")
    (tmp_path / "p.txt").write_bytes("猫、座っている".encode("cp932"))
    with pytest.raises(UserError, match="it looks like Shift-JIS"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["meta.json", "meta.jsonl"])
def test_the_error_for_a_metadata_file_suggests_the_encoding(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "a", 1)
    line = '{"image_path": "p0.png", "caption": "猫、座っている、青い空"}'
    (tmp_path / name).write_bytes((line if name.endswith("l") else f'{{"p0": {line}}}').encode("cp932"))
    subset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/a'\n"
    subset += f"metadata_file = '{{here}}/{name}'"
    with pytest.raises(UserError, match=rf"metadata_file .*{name} is not UTF-8 text.*it looks like Shift-JIS"):
        collect(load_dataset_config(write_config(tmp_path / "data.toml", subset)))


@pytest.mark.parametrize("path", [r"C:\data\cat", r"C:\users\me"])
def test_the_error_for_a_windows_path_in_double_quotes_suggests_single_quotes(tmp_path: Path, path: str) -> None:
    (tmp_path / "a.toml").write_text(f'image_dir = "{path}"')
    with pytest.raises(UserError, match="write paths with / or in single quotes"):
        read_toml(tmp_path / "a.toml", "--dataset_config")


def test_other_toml_errors_do_not_suggest_single_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('image_dir = "a\\\\b"\nx = \n')
    with pytest.raises(UserError) as raised:
        read_toml(tmp_path / "a.toml", "--dataset_config")
    assert "quotes" not in str(raised.value)


def test_a_backslash_parsed_as_a_tab_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subset = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "C:\\train"'
    collect(load_dataset_config(write_config(tmp_path / "data.toml", subset)))
    assert "in single quotes" in caplog.text
