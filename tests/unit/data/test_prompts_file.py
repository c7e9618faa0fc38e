"""The forms of --prompts_file and the errors for mistakes in them."""

import logging
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.data.concepts.prompts_file import PromptPair, read_prompt_pairs


def write_file(folder: Path, text: str, name: str = "prompts.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read_pairs(folder: Path, text: str) -> list[PromptPair]:
    return read_prompt_pairs(write_file(folder, text))


def fields_of(pair: PromptPair) -> tuple[str, str, str, str, str, float]:
    return pair.target, pair.positive, pair.unconditional, pair.neutral, pair.action, pair.multiplier


def catch_refusal(folder: Path, text: str, name: str = "prompts.toml") -> str:
    with pytest.raises(ValueError) as refused:
        read_prompt_pairs(write_file(folder, text, name))
    message = str(refused.value)
    assert message.startswith("--prompts_file ") and name in message and "\n" not in message
    return message


def test_a_target_alone_is_erased_with_default_values(tmp_path: Path) -> None:
    (pair,) = read_pairs(tmp_path, '[[prompts]]\ntarget = "van gogh"\n')
    assert fields_of(pair) == ("van gogh", "van gogh", "", "", "erase", 1.0)
    assert (pair.height, pair.width, pair.batch_size, pair.weight, pair.guidance_scale) == (512, 512, 1, 1.0, 1.0)
    assert not pair.dynamic_resolution and not pair.dynamic_crops
    assert pair.push == -1.0


def test_every_key_of_a_prompt_is_read(tmp_path: Path) -> None:
    (pair,) = read_pairs(
        tmp_path,
        """
        [[prompts]]
        target = "cat"
        positive = "fluffy cat"
        unconditional = "bald cat"
        neutral = "animal"
        action = "enhance"
        guidance_scale = 2.5
        resolution = [512, 768]
        batch_size = 3
        dynamic_crops = true
        multiplier = -1.5
        weight = 0.5
        """,
    )
    assert fields_of(pair) == ("cat", "fluffy cat", "bald cat", "animal", "enhance", -1.5)
    assert (pair.height, pair.width, pair.batch_size, pair.weight, pair.push) == (512, 768, 3, 0.5, 2.5)
    assert pair.dynamic_crops


def test_neutral_defaults_to_the_unconditional_prompt(tmp_path: Path) -> None:
    (pair,) = read_pairs(tmp_path, '[[prompts]]\ntarget = "cat"\nunconditional = "ugly"\n')
    assert pair.neutral == "ugly"


def test_top_level_keys_are_defaults_for_all_entries(tmp_path: Path) -> None:
    text = (
        'resolution = 768\naction = "enhance"\n[[prompts]]\ntarget = "a"\n[[prompts]]\ntarget = "b"\nresolution = 256\n'
    )
    first, second = read_pairs(tmp_path, text)
    assert (first.height, second.height) == (768, 256)
    assert first.action == second.action == "enhance"


def test_a_slider_with_both_ends_gives_four_pairs(tmp_path: Path) -> None:
    pairs = read_pairs(
        tmp_path,
        """
        guidance_scale = 2.0
        neutral = "photo"
        [[targets]]
        target_class = "person"
        positive = "old"
        negative = "young"
        multiplier = 0.5
        weight = 2
        """,
    )
    assert [fields_of(pair) for pair in pairs] == [
        ("person", "young", "old", "photo", "erase", 0.5),
        ("person", "old", "young", "photo", "enhance", 0.5),
        ("person", "old", "young", "photo", "erase", -0.5),
        ("person", "young", "old", "photo", "enhance", -0.5),
    ]
    assert {pair.weight for pair in pairs} == {2.0} and {abs(pair.push) for pair in pairs} == {2.0}


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("positive", [("", "old", "", "", "enhance", 1.0), ("", "old", "", "", "erase", -1.0)]),
        ("negative", [("", "old", "", "", "erase", 1.0), ("", "old", "", "", "enhance", -1.0)]),
    ],
)
def test_a_slider_with_one_end_gives_two_pairs(tmp_path: Path, end: str, expected: list[object]) -> None:
    assert [fields_of(pair) for pair in read_pairs(tmp_path, f'[[targets]]\n{end} = "old"\n')] == expected


def test_a_slider_has_its_pairs_for_each_neutral_prompt_and_size(tmp_path: Path) -> None:
    write_file(tmp_path, "a painting\n\n  a photo \n", "neutrals.txt")
    text = """
        neutrals = ["", "a drawing"]
        neutral_prompt_file = "neutrals.txt"
        resolutions = [[512, 512], [768, 512]]
        [[targets]]
        positive = "old"
        [[targets]]
        positive = "large"
        neutral = "a house"
        resolution = 64
    """
    pairs = read_pairs(tmp_path, text)
    first, second = pairs[:16], pairs[16:]
    assert [pair.neutral for pair in first[::4]] == ["", "a drawing", "a painting", "a photo"]
    assert {(pair.height, pair.width) for pair in first} == {(512, 512), (768, 512)}
    assert [(pair.neutral, pair.height) for pair in second] == [("a house", 64)] * 2


@pytest.mark.parametrize(
    "text",
    [
        '[[targets]]\ntarget = "x"\n',
        'target = "x"\n',
        '[slider]\ntarget = "x"\n',
        '[[slider.targets]]\ntarget = "x"\n',
        'target = "x"\n[[prompts]]\nbatch_size = 1\n',
    ],
)
def test_every_form_that_sd_scripts_accepts_is_read(tmp_path: Path, text: str) -> None:
    assert [fields_of(pair) for pair in read_pairs(tmp_path, text)] == [("x", "x", "", "", "erase", 1.0)]


@pytest.mark.parametrize(
    "text", ['[[prompts]]\ntarget_class = "cat"\npositive = "old"\n', 'target_class = "cat"\npositive = "old"\n']
)
def test_a_target_class_makes_a_slider_in_any_table(tmp_path: Path, text: str) -> None:
    assert [pair.action for pair in read_pairs(tmp_path, text)] == ["enhance", "erase"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it needs [[prompts]]"),
        ("batch_size = 1\n", "names no prompts"),
        ("prompts = []\n", "prompts is not a list of tables; begin each entry with [[prompts]]"),
        ('[prompts]\ntarget = "x"\n', "begin each entry with [[prompts]]"),
        ('[[prompts]]\ntarget = "x"\n[[targets]]\npositive = "y"\n', "has prompts and targets"),
        ('batch_size = 1\n[slider]\ntarget = "x"\n', "belong in [slider]: move batch_size there"),
        ('[[prompts]]\npositive = "x"\n', '[[prompts]] number 1 has no target; add target = "..."'),
        ('[[prompts]]\ntarget = "x"\n[[prompts]]\ntaget = "y"\n', "number 2: taget is not a key (did you mean"),
        ('[[targets]]\npositive = "x"\naction = "erase"\n', "action is not a key; use target_class"),
        ('resolutoin = 64\n[[prompts]]\ntarget = "x"\n', "resolutoin is not a key (did you mean resolution?)"),
        ('[[prompts]]\ntarget = "x"\ntarget_class = "y"\n', "has target and target_class"),
        ("[[prompts]]\ntarget = 5\n", "target is 5, but must be text in quotes"),
        ('[[prompts]]\ntarget = "x"\naction = "delete"\n', "action is 'delete', but must be one of erase"),
        ('[[prompts]]\ntarget = "x"\nresolution = [1, 2, 3]\n', "resolution is [1, 2, 3], but must be a side from 1"),
        ('[[prompts]]\ntarget = "x"\nbatch_size = 0\n', "batch_size is 0, but must be a whole number from 1"),
        ('[[prompts]]\ntarget = "x"\nguidance_scale = inf\n', "guidance_scale is inf, but must be a number"),
        (f'[[prompts]]\ntarget = "x"\nguidance_scale = {10**400}\n', "a number of more than 300 digits"),
        (f'[[prompts]]\ntarget = "x"\nguidance_scale = 1{"0" * 5000}\n', "is not valid TOML: it has a number"),
        ('[[prompts]]\ntarget = "x"\nmultiplier = 0\n', "other than 0, which teaches nothing"),
        ('[[prompts]]\ntarget = "x"\nweight = -1\n', "a number up to 1000 and above 0"),
        ('[[prompts]]\ntarget = "x"\ndynamic_crops = 1\n', "dynamic_crops is 1, but must be true or false"),
        ('[[prompts]]\ntarget = ""\n', "teaches nothing: positive and unconditional are both ''"),
        ('[[prompts]]\ntarget = "x"\nneutral = "x"\nguidance_scale = 0\n', "teaches nothing: guidance_scale is 0"),
        ('[[targets]]\ntarget_class = "x"\n', "has neither positive nor negative"),
        ('[[targets]]\npositive = "x"\nnegative = "x"\n', "positive and negative are both 'x'"),
        ('[[targets]]\npositive = "x"\nneutrals = "y"\n', "neutrals is 'y', but must be a list of texts"),
        ('[[targets]]\npositive = "x"\nneutrals = []\n', "neutrals contain no prompt"),
        ('[[targets]]\npositive = "x"\nneutral = "y"\nneutrals = ["z"]\n', "has both neutral and neutrals"),
        ('[[targets]]\npositive = "x"\nprompt_file = "no.txt"\n', "no.txt, but there is no such file"),
        ('[[targets]]\npositive = "x"\nresolution = 64\nresolutions = 64\n', "has both resolution and resolutions"),
        ("[[prompts]\n", "is not valid TOML"),
    ],
)
def test_each_mistake_raises_a_one_line_error_with_a_solution(tmp_path: Path, text: str, message: str) -> None:
    assert message in catch_refusal(tmp_path, text)


def test_yaml_files_of_other_programs_are_refused(tmp_path: Path) -> None:
    assert "must be a TOML file; docs/train_leco.md" in catch_refusal(tmp_path, "- target: x\n", "prompts.yaml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but there is no such file"):
        read_prompt_pairs(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[targets]]\npositive = "x"\nresolutions = [512, 768]\n', "is one size, height 512, width 768; for"),
        (
            '[[prompts]]\ntarget = "x"\nresolution = [512, 768]\ndynamic_resolution = true\n',
            "dynamic_resolution has no effect on 512 x 768",
        ),
    ],
)
def test_probable_mistakes_are_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        read_pairs(tmp_path, text)
    (record,) = caplog.records
    assert message in record.message


def test_each_warning_is_given_once_to_the_given_function(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '[[targets]]\npositive = "p"\nresolutions = [64, 128]\nneutrals = ["", "a photo", "a painting"]'
    warnings: list[object] = []
    with caplog.at_level(logging.WARNING):
        read_prompt_pairs(write_file(tmp_path, text), warn=lambda *message: warnings.append(message))
    assert len(warnings) == 1 and caplog.records == []


def test_a_preserved_prompt_is_trained_toward_its_own_prediction(tmp_path: Path) -> None:
    text = (
        '[[prompts]]\ntarget = "a circle"\n[[prompts]]\ntarget = "a square"\naction = "preserve"\nguidance_scale = 2\n'
    )
    erased, preserved = read_pairs(tmp_path, text)
    assert erased.push == -1.0 and (preserved.push, preserved.neutral) == (0.0, "a square")
    for key in ("positive", "neutral"):
        with pytest.raises(UserError, match=f"number 2: {key} has no effect with action preserve"):
            read_pairs(tmp_path, f'{text}{key} = "a"\n')
    with pytest.raises(UserError, match="every entry has action preserve, so nothing is changed; add one to erase"):
        read_pairs(tmp_path, '[[prompts]]\ntarget = "a square"\naction = "preserve"\n')
