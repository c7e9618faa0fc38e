"""Errors and warnings for options of other scripts name those scripts and the option's name here."""

import importlib
import re
from pathlib import Path

import pytest

from library.architectures.scripts import Script, describe_scripts, list_scripts
from library.architectures.specs import list_specs
from library.options.other_programs import SD_SCRIPTS, has_option
from library.training.command_line.cli import parse
from tests.tiny.bases import BASES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = list_scripts()
FLAG = re.compile(r"--([a-z_0-9]+)(?: ([a-z_]+))?")
QUICK = ("train_network.py", "flux_train_network.py", "zimage_train_network.py")
ALL = {name for script in SCRIPTS for name in script.options.defaults()}
IN_PROMPTS = {"g", "l"}
OF_OTHER_PROGRAMS = {  # musubi-tuner, sd-scripts before Anima was released
    "dit", "gradient_checkpointing_cpu_offload", "vae_dtype", "use_32bit_attention", "disable_numpy_memmap", "kv_cache",
    *(name for base in BASES.values() for name in base.other_options),
}  # fmt: skip


def parser_of(script: Script):  # type: ignore[no-untyped-def]
    return importlib.import_module(script.name.removesuffix(".py")).setup_parser()


def test_the_scripts_are_those_of_the_model_specs() -> None:
    assert {(s.name, s.options) for s in SCRIPTS} == {(spec.script, spec.options) for spec in list_specs()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_suggested_replacements_exist(script: Script) -> None:
    defaults = script.options.defaults()
    actions = {action.dest: action for action in parser_of(script)._actions}
    for name, words in script.instead.items():
        assert name in (ALL | OF_OTHER_PROGRAMS) - defaults.keys(), f"{name} is {script.name}'s own, or nobody's"
        for flag, value in FLAG.findall(words):
            assert flag in defaults or flag in IN_PROMPTS, f"{script.name} has no --{flag}"
            if value and flag in defaults and actions[flag].choices:
                assert value in actions[flag].choices


@pytest.mark.parametrize(
    "script",
    [pytest.param(one, marks=() if one.name in QUICK else pytest.mark.nightly, id=one.name) for one in SCRIPTS],
)
def test_errors_name_the_scripts_of_every_foreign_option(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """Except abbreviations of this script's options, such as `--text_encoder` for --text_encoder_lr."""
    parser = parser_of(script)
    names = [n for n in sorted(ALL - script.options.defaults().keys()) if not parser._get_option_tuples(f"--{n}")]
    assert len(ALL - script.options.defaults().keys()) - len(names) <= 1
    for words in ([f"--{name}=x" for name in names], [word for name in names for word in (f"--{name}", "x")]):
        with pytest.raises(SystemExit) as ended:
            parse(parser, words)
        assert ended.value.code == 2
        hints = dict(re.findall(r"--(\w+)(?:=x)? \((an option of [^()]+)\)", capsys.readouterr().err))
        assert list(hints) == names
        for name, hint in hints.items():
            has = {other.name for other in SCRIPTS if name in other.options.defaults()}
            scripts = set(re.findall(r"\w+\.py", hint))
            assert scripts == ({other.name for other in SCRIPTS} - has if "every script but" in hint else has)
            assert hint.endswith(script.instead.get(name, ".py"))


def test_a_config_file_with_foreign_options_gets_the_same_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (script,) = (script for script in SCRIPTS if "training_shift" in script.options.defaults())
    keys = ("discrete_flow_shift = 3.0", "lerning_rate = 1.0", "guidance_scale = 1.0", 'ae = ""', "split_mode = false")
    (tmp_path / "train.toml").write_text("\n".join(keys))
    args = parse(parser_of(script), ["--config_file", str(tmp_path / "train.toml")])
    assert not hasattr(args, "discrete_flow_shift")
    assert "train.toml: ignored: discrete_flow_shift (an option of every script but" in caplog.text
    assert "use --training_shift" in caplog.text
    assert "train.toml: ignored: guidance_scale (an option of " in caplog.text
    assert "train.toml: ignored, no such option: lerning_rate (nearest: learning_rate)" in caplog.text
    assert "split_mode" not in caplog.text and "ae (" not in caplog.text  # not in the file


def test_options_of_other_programs_and_earlier_versions_are_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = (script for script in SCRIPTS if script.name == "anima_train_network.py")
    with pytest.raises(SystemExit):
        parse(parser_of(script), ["--dit_path=x", "--qwen3_path", "y", "--vae_path=z", "--timestep_sample_method=w"])
    message = capsys.readouterr().err
    assert "--dit_path=x (use --pretrained_model_name_or_path) --qwen3_path (nearest: --qwen3) y" in message
    assert "--vae_path=z (nearest: --vae) --timestep_sample_method=w (use --timestep_sampling)" in message


@pytest.mark.parametrize("words", [["--text_encoder", "qwen.safetensors"], ["--text_encoder=qwen.safetensors"]])
def test_a_path_for_an_abbreviated_numeric_option_gets_a_hint(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for script in SCRIPTS:
        if "text_encoder" in script.options.defaults():
            continue
        with pytest.raises(SystemExit):
            parse(parser_of(script), [*words, "--seed", "3"])
        message = capsys.readouterr().err
        named, _, hint = message.partition("; ")
        assert f"unrecognized arguments: {words[0]} (an option of " in named
        assert "hunyuan_image_train_network.py" in named and hint
        if has_option(SD_SCRIPTS, script.name, "text_encoder_batch_size"):
            continue  # ambiguous there too
        assert parse(parser_of(script), ["--text_encoder", "1e-5"]).text_encoder_lr in (1e-5, [1e-5])


@pytest.mark.parametrize(
    ("has", "words"),
    [
        ("a", "an option of a"),
        ("abc", "an option of every script but d and e"),
        ("abcd", "an option of every script but e"),
        ("abcde", "an option of every other script"),
    ],
)
def test_the_shorter_list_of_scripts_is_named(has: str, words: str) -> None:
    assert describe_scripts(list(has), list("abcde")) == words


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_prompt_only_options_name_the_scripts_that_have_them(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hint = " (an option of train_leco.py and sdxl_train_leco.py, which train concepts from prompts alone)"
    with pytest.raises(SystemExit):
        parse(parser_of(script), ["--prompts_file", "erase.toml", "--max_denoising_steps=20"])
    assert f"--prompts_file{hint} erase.toml --max_denoising_steps=20{hint}" in capsys.readouterr().err
    (tmp_path / "train.toml").write_text("leco_denoise_guidance_scale = 2.0")
    parse(parser_of(script), ["--config_file", str(tmp_path / "train.toml")])
    assert f"ignored: leco_denoise_guidance_scale{hint}" in caplog.text
