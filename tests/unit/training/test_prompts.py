"""Prompt files: their syntax, and the errors for mistakes in them."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from library.base.errors import UserError
from library.options.output.prompts import LINE_OPTIONS, PromptSpec, parse_line, read_prompts, walk_seeds
from library.options.training.run import MAX_SEED
from library.protocols import PromptDefaults
from library.training.evaluation.prompts import resolve

SD = PromptDefaults(num_steps=30, width=512, height=512, scale=7.5, size_step=8, sampler="ddim")
FLOW = PromptDefaults(num_steps=20, width=512, height=512, scale=1.0, size_step=16, guidance_scale=3.5, flow_shift=3.0)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as refused:
        read_prompts(path)
    return str(refused.value)


def test_a_line_has_its_prompt_and_its_options() -> None:
    line = (
        "a cat, on a mat --w 768 --H 512 --d 7 --s 25 --L 5.5 --g 3 --n blurry, a dog --ss k_euler --ctr 0.3 --rcfg 1 "
    )
    assert parse_line(line + "--fs 2.5", "p") == PromptSpec(
        "p", "a cat, on a mat", "blurry, a dog", 768, 512, 7, 25, 5.5, 3.0, "k_euler", 0.3, 1.0, 2.5
    )


def test_a_bare_prompt_uses_the_models_defaults() -> None:
    assert parse_line("  a cat\n", "p") == PromptSpec("p", "a cat")


@pytest.mark.parametrize("text", ["n dogs", "w 5", "s 3 cats", "a--n x", "d 1--w 3", "l"])
def test_text_that_looks_like_an_option_is_text(text: str) -> None:
    assert parse_line(text, "p") == PromptSpec("p", text)


def test_a_line_of_options_alone_is_an_empty_prompt() -> None:
    assert parse_line("--w 64", "p") == PromptSpec("p", "", width=64)


def test_an_empty_negative_prompt_is_allowed() -> None:
    assert parse_line("a --n ", "p").negative_prompt == "" == parse_line("a --n", "p").negative_prompt


def test_a_seed_of_minus_one_means_no_seed() -> None:
    assert parse_line("a --d -1", "p").seed is None
    assert parse_line("a --d 0", "p").seed == 0


def test_seeds_walk_by_the_number_of_a_prompt(tmp_path: Path) -> None:
    text = f"a --d 42\n\n# b\nc\nd --am -1,1 --d 42\ne --d {MAX_SEED}\n"
    specs = walk_seeds(read_prompts(written(tmp_path, "p.txt", text)))
    assert [spec.seed for spec in specs] == [42, None, 44, 44, 2]


def test_text_files_may_have_comments_blank_and_indented_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeff# a comment\n\n   a cat --d 1\r\n#\n\ta dog\n  # another\nкот 猫")
    assert [(w.prompt, w.place) for w in read_prompts(path, "--prompts")] == [
        ("a cat", f"--prompts {path}, line 3"),
        ("a dog", f"--prompts {path}, line 5"),
        ("кот 猫", f"--prompts {path}, line 7"),
    ]


def test_toml_files_have_shared_settings_and_a_table_per_image(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "p.TOML",
        '[prompt]\nwidth = 768\nscale = 5\nnegative_prompt = "dog"\n'
        '[[prompt.subset]]\nprompt = "a -- cat --w 3"\n[[prompt.subset]]\nprompt = "b"\nwidth = 64.0\nseed = 9\n',
    )
    first, second = read_prompts(path)
    assert (first.prompt, first.width, first.scale, first.negative_prompt) == ("a -- cat --w 3", 768, 5.0, "dog")
    assert (second.width, second.seed, second.scale) == (64, 9, 5.0)
    assert isinstance(second.width, int) and isinstance(second.scale, float)


def test_json_is_a_list_of_lines_and_objects(tmp_path: Path) -> None:
    path = written(tmp_path, "p.json", json.dumps(["a cat --w 64", {"prompt": "b", "sample_steps": 4, "seed": None}]))
    first, second = read_prompts(path)
    assert (first.prompt, first.width) == ("a cat", 64)
    assert (second.prompt, second.sample_steps, second.seed) == ("b", 4, None)


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_an_empty_file_holds_no_prompts(tmp_path: Path, name: str) -> None:
    assert read_prompts(written(tmp_path, name, "\n")) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --q 3", ["--q", "--w"]),
        ("a --steps 3", ["--steps", "--s"]),
        ("a --w512", ["--w512", "space before its value"]),
        ("a -- b", ["--", ".toml or .json"]),
        ("a --w wide", ["width (--w)", "'wide'", "whole number"]),
        ("a --w", ["width (--w)", "''"]),
        ("a --w 64.5", ["width (--w)", "whole number"]),
        ("a --w 0", ["width (--w)", "0", "1 to"]),
        ("a --w 9999999", ["width (--w)", "9999999"]),
        ("a --s 0", ["sample_steps (--s)", "1 to 1000"]),
        ("a --s 1001", ["sample_steps (--s)", "1 to 1000"]),
        ("a --d -2", ["seed (--d)", "-2"]),
        ("a --d 99999999999999999999", ["seed (--d)"]),
        ("a --l 7,5", ["scale (--l)", "'7,5'"]),
        ("a --l nan", ["scale (--l)", "nan"]),
        ("a --l inf", ["scale (--l)", "inf"]),
        ("a --fs 0", ["flow_shift (--fs)"]),
        ("a --ctr 1.5", ["cfg_trunc_ratio (--ctr)", "0 to 1"]),
        ("a --ss euler_b", ["sample_sampler (--ss)", "euler_b", "did you mean euler"]),
        ("a --w 64 --W 64", ["--W", "twice"]),
    ],
)
def test_errors_in_a_line_name_the_line(tmp_path: Path, line: str, words: list[str]) -> None:
    path = written(tmp_path, "p.txt", f"a good one --w 64\n\n{line}\n")
    message = refusal_of(path)
    assert message.startswith(f"--sample_prompts {path}, line 3")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '[{"prompt": "a", "hight": 3}]', ["entry 1", "hight", "did you mean height"]),
        ("p.json", '["a", {"width": 3}]', ["entry 2", '"prompt"']),
        ("p.json", '[{"prompt": "a", "width": true}]', ["entry 1", "width", "True"]),
        ("p.json", '[{"prompt": "a", "scale": "7"}]', ["entry 1", "scale", "'7'"]),
        ("p.json", '[{"prompt": ["a"]}]', ["entry 1", "prompt", "text"]),
        ("p.json", '[{"prompt": "a", "sample_sampler": 3}]', ["entry 1", "sample_sampler"]),
        ("p.json", '[{"prompt": "a", "sample_sampler": ["ddim"]}]', ["entry 1", "sample_sampler"]),
        ("p.json", "[3]", ["entry 1", "3"]),
        ("p.json", '{"prompt": "a"}', ["must be a list"]),
        ("p.json", '["a",\n oops]', ["not valid JSON", "line 2"]),
        ("p.json", "[" * 100000, ["not valid JSON"]),
        ("p.toml", 'prompt = "a"', ["[prompt]", "[[prompt.subset]]"]),
        ("p.toml", "[promt]\n", ["[prompt]", "[[prompt.subset]]"]),
        ("p.toml", '[prompt]\nprompt = "a"\n', ["[[prompt.subset]]"]),
        ("p.toml", "[prompt]\nsubset = [3]\n", ["number 1", "3"]),
        ("p.toml", "[prompt]\nwidth = \n", ["not valid TOML", "line 2"]),
        ("p.toml", '[prompt]\n[[prompt.subset]]\nprompt = "a"\nwith = 3\n', ["number 1", "with ", "width"]),
        ("p.txt", b"caf\xe9", ["not UTF-8", "byte 3"]),
        ("p.csv", "a", [".txt"]),
        ("p", "a", [".txt"]),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    path = written(tmp_path, name, content)
    message = refusal_of(path)
    assert message.startswith("--sample_prompts") and str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["p.txt", "p.toml", "p.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in refusal_of(tmp_path / name)
    (tmp_path / name).mkdir()
    assert str(tmp_path / name) in refusal_of(tmp_path / name)


def test_unset_prompt_options_come_from_the_model() -> None:
    prompt = resolve(PromptSpec("p", "a", seed=3), SD)
    assert (prompt.text, prompt.negative, prompt.seed, prompt.sampler) == ("a", "", 3, "ddim")
    assert (prompt.width, prompt.height, prompt.num_steps, prompt.scale) == (512, 512, 30, 7.5)
    assert prompt.guidance_scale is None
    flow = resolve(PromptSpec("p", "a", guidance_scale=0.0, scale=0.0), FLOW)
    assert (flow.guidance_scale, flow.scale, flow.flow_shift, flow.sampler) == (0.0, 0.0, 3.0, None)


@pytest.mark.parametrize(("requested", "sd", "flow"), [(64, 64, 64), (1, 64, 64), (509, 504, 496), (1024, 1024, 1024)])
def test_sides_are_rounded_down_to_sizes_that_the_model_supports(requested: int, sd: int, flow: int) -> None:
    assert resolve(PromptSpec("p", "a", width=requested), SD).width == sd
    assert resolve(PromptSpec("p", "a", height=requested), FLOW).height == flow


@pytest.mark.parametrize(
    ("line", "defaults", "flag"), [("a --g 3", SD, "--g"), ("a --fs 3", SD, "--fs"), ("a --ss euler", FLOW, "--ss")]
)
def test_a_setting_that_the_model_does_not_support_is_warned_about(
    caplog: pytest.LogCaptureFixture, line: str, defaults: PromptDefaults, flag: str
) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(parse_line(line, "p.txt, line 4"), defaults)
    (record,) = caplog.records
    assert "p.txt, line 4" in record.message and flag in record.message and "no effect" in record.message


@pytest.mark.parametrize(
    ("line", "defaults", "num_warnings"),
    [("a --n blurry", FLOW, 1), ("a --n blurry --l 1", SD, 1), ("a --n blurry --l 4", FLOW, 0), ("a --n", FLOW, 0)],
)
def test_a_negative_prompt_without_guidance_is_warned_about(
    caplog: pytest.LogCaptureFixture, line: str, defaults: PromptDefaults, num_warnings: int
) -> None:
    resolve(parse_line(line, "p.txt, line 4"), defaults)
    assert len(caplog.messages) == num_warnings
    assert all("p.txt, line 4: negative_prompt (--n) has no effect at scale (--l) 1" in m for m in caplog.messages)


def test_a_controlnet_image_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = parse_line("a cat --cn my poses/pose.png --w 64", "p.txt, line 4")
    prompt = resolve(spec, SD)
    assert (prompt.text, prompt.width) == ("a cat", 64)
    assert caplog.messages == [
        "p.txt, line 4: controlnet_image (--cn) is ignored, because no ControlNet is loaded in adapter training"
    ]


def test_every_option_of_a_line_is_also_a_key(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "negative_prompt": "x", "sample_sampler": "ddim", "cfg_trunc_ratio": 0.5, "image_path": "my cat.png",
        "controlnet_image": "my pose.png", "control_image_path": ["before.png", "style.png"],
    }  # fmt: skip
    keys = list(LINE_OPTIONS.values())
    path = written(tmp_path, "p.json", json.dumps([{"prompt": "a", **{key: values.get(key, 8) for key in keys}}]))
    (spec,) = read_prompts(path)
    assert all(getattr(spec, key) == values.get(key, 8) for key in keys if key != "control_image_path")
    assert spec.control_image_path == ("before.png", "style.png")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("--w 256 a cat that sits", "a cat that sits"),
        ("a cat --w 256 in the snow", "a cat in the snow"),
        ("a cat --w 256 in --s 4 the snow", "a cat in the snow"),
    ],
)
def test_words_after_a_number_belong_to_the_prompt(line: str, prompt: str) -> None:
    spec = parse_line(line, "here")
    assert (spec.prompt, spec.width) == (prompt, 256)


def test_a_negative_prompt_and_a_path_take_all_words_up_to_the_next_option() -> None:
    spec = parse_line("a cat --n dark and blurry --w 256 --i my pictures/cat.png", "here")
    assert (spec.prompt, spec.negative_prompt) == ("a cat", "dark and blurry")
    assert spec.image_path == "my pictures/cat.png"


def test_reference_images_can_be_given_in_a_line_and_in_a_table(tmp_path: Path) -> None:
    first, second = tmp_path / "a b.png", tmp_path / "c.png"
    for path in (first, second):
        path.write_bytes(b"x")
    spec = parse_line(f"make it red --ci {first} --w 64 --ci {second} --s 3", "p.txt, line 1")
    assert spec.control_image_path == (str(first), str(second)) and spec.sample_steps == 3
    assert resolve(spec, FLOW, max_references=2).reference_paths == (first, second)
    (table,) = read_prompts(
        written(tmp_path, "p.json", json.dumps([{"prompt": "a", "control_image_path": str(first)}]))
    )
    assert resolve(table, FLOW, max_references=1).reference_paths == (first,)


def test_invalid_reference_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = parse_line(f"a --ci {tmp_path / 'nowhere.png'}", "p.txt, line 1")
    with pytest.raises(UserError, match=r"control_image_path \(--ci\) is .*nowhere.png, but there is no such file"):
        resolve(spec, FLOW, max_references=1)
    with pytest.raises(UserError, match=r"\(--ci\) names 2 images, but this base model takes at most 1"):
        resolve(parse_line("a --ci x.png --ci y.png", "p"), FLOW, max_references=1)
    assert resolve(spec, FLOW).reference_paths == ()
    assert "control_image_path (--ci) has no effect on this base model" in caplog.text
    for value in (3, ["a.png", 3]):
        with pytest.raises(UserError, match=r"control_image_path .* is .*, but must be the path of an image, or a l"):
            read_prompts(written(tmp_path, "p.json", json.dumps([{"prompt": "a", "control_image_path": value}])))
