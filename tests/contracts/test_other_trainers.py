"""Configurations of other trainers become options here, as docs/come_over.md counts them."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.architectures.scripts import Script, list_scripts
from library.base.errors import UserError
from library.data.description.dataset_file import explain_key, find_problems, read_description
from library.data.description.schema import ALL_KEYS
from library.options.declared import list_declared
from library.options.dit import DitTrainOptions
from library.options.leco import LecoOptions
from library.options.other_programs import (
    CONVERSIONS,
    FOLDER,
    Equivalent,
    has_option,
    list_programs,
    read_names,
    read_program,
    read_whole_program,
)
from library.options.output.prompts import PromptSpec
from library.training.command_line.cli import normalize, parse
from library.training.command_line.option_checks import check_values
from library.training.config_file import read_config
from library.translation.writing import TranslatedFiles, render_files
from networks.core.arguments.common import COMMON
from networks.core.arguments.network_arguments import read_groups
from networks.core.registry.layouts import list_kinds
from tests.contracts.other_trainers import DATA, PAGE, START, Example, count, find_example, list_examples, render_table

LINES = json.loads((DATA / "lines_of_other_trainers.json").read_text(encoding="utf-8"))
EXAMPLES = list_examples()
LEAST = 0.88


def test_the_table_of_the_page_is_what_the_translation_counts() -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = list(render_table())
    assert page[page.index(START) :].splitlines() == lines
    share = re.search(r"([\d.]+)% of the settings", lines[-1])
    assert len(EXAMPLES) >= 40 and share is not None and float(share[1]) >= 100 * LEAST


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.path)
def test_each_claim_names_the_line_of_the_other_trainer(example: Example) -> None:
    configuration_program = {"fluxgym": "sd_scripts"}.get(example.program, example.program)
    claimed = [o.name for o in example.translate().outcomes if o.how in ("equal", "converted")]
    assert claimed and [name for name in claimed if name not in LINES[configuration_program]] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.path)
def test_the_script_accepts_every_line(example: Example, tmp_path: Path) -> None:
    translation = example.translate()
    files = TranslatedFiles(tmp_path / "run.toml")
    for path, text in render_files(translation, Path(example.path), files).items():
        path.write_text(text, encoding="utf-8")
    parser = importlib.import_module(translation.script.removesuffix(".py")).setup_parser()
    config = read_config(files.config, {action.dest: action for action in parser._actions})
    assert all("max_token_length" in warning for warning in config.warnings)
    kind = next(script.options for script in list_scripts() if script.name == translation.script)
    paths = [name for name, declared in kind.declarations().items() if declared.path]  # are not on this machine
    given = {name: value for name, value in config.values.items() if name not in paths}
    check_values(kind.from_args(normalize(argparse.Namespace(**{**kind.defaults(), **given}))))
    if translation.datasets:
        assert find_problems(read_description(str(files.dataset)), masked_loss=False) == []
    for words in (config.values.get("optimizer_args"), config.values.get("network_args")):
        assert all(re.fullmatch(r"\w+=[^\s\"]+", word) for word in words or () if "patterns" not in word)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.path)
def test_a_number_of_steps_is_the_length_where_it_is_that_of_the_other_trainer(example: Example) -> None:
    """Here --max_train_epochs counts if both are given, as in sd-scripts and what is built on it."""
    translation = example.translate()
    of_epochs = {"sd_scripts", "musubi_tuner", "kohya_ss", "lora_easy", "fluxgym"}
    if example.program not in of_epochs and "max_train_steps" in translation.options:
        assert "max_train_epochs" not in translation.options


def test_nothing_is_dropped_in_silence() -> None:
    """Every setting of a file has an outcome, and each without an equal says what happens instead."""
    for example in EXAMPLES:
        outcomes = example.translate().outcomes
        assert all(outcome.text for outcome in outcomes if outcome.how == "missing")
    flux = find_example("ostris/ai-toolkit", "lora_flux_24gb").translate()
    assert sum(count(flux).values()) == len(flux.outcomes) == 42


# Every option of sd-scripts and of musubi-tuner is taken, with its default or another, without effect, or refused.
# `data/options_<trainer>.json` are their options: of sd-scripts by the version that brought them, those of 0.12.1 and
# 0.12.2 as read in its release notes, and of musubi-tuner at commit 30c658c (0.3.4). Replacing a list shows what is
# new.

SCRIPTS = {script.name: script for script in list_scripts()}


@dataclass(frozen=True)
class Trainer:
    """A program whose commands run here, and what is taken otherwise than there, with the reason."""

    name: str
    scripts: Sequence[str]
    other_defaults: Mapping[str, str] = field(default_factory=dict)
    refused_choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def options(self) -> list[dict[str, Any]]:
        options: list[dict[str, Any]] = json.loads((DATA / f"options_{self.name}.json").read_text(encoding="utf-8"))
        return options


SD_SCRIPTS = Trainer(
    "sd_scripts",
    [f"{name}train_network.py" for name in ("", "anima_", "flux_", "hunyuan_image_", "lumina_", "sd3_", "sdxl_")],
)
MUSUBI_TUNER = Trainer(
    "musubi_tuner",
    [name for name, script in SCRIPTS.items() if issubclass(script.options, DitTrainOptions)],
    other_defaults={
        "dynamo_backend": "the backend of --torch_compile; an upper-case name selects compiling by itself, as there",
        "mixed_precision": "no is accelerate's default there",
        "timestep_sampling": "what the base model's makers advise",
        "discrete_flow_shift": "what the base model's makers advise",
        "weighting_scheme": "uniform and none are the same",
    },
    refused_choices={"timestep_sampling": ["ideogram4_shift"]},  # of a base model that this suite does not have
)
CASES = [(trainer, script) for trainer in (SD_SCRIPTS, MUSUBI_TUNER) for script in trainer.scripts]


@cache
def actions_of(script: str) -> dict[str, argparse.Action]:
    parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
    return {action.dest: action for action in parser._actions}


def sort_option(trainer: Trainer, script: Script, option: dict[str, Any]) -> str:
    """Return how `script` takes an option of a trainer, with the reason where it does so otherwise."""
    action, facts = actions_of(script.name).get(option["name"]), script.options.declarations().get(option["name"])
    if action is None or facts is None:
        return "unsorted: refused"
    if facts.unsupported is not None and not facts.needs.names:
        return f"refused: {facts.unsupported}"
    if action.choices is not None:
        missing = [choice for choice in option.get("choices", []) if choice not in action.choices]
        if missing != list(trainer.refused_choices.get(option["name"], [])):
            return f"unsorted: refuses {missing}"
    if facts.ignored is not None:
        return f"no effect: {facts.ignored}"
    # An empty text and 0 are no choice where nothing is the default.
    if action.default not in (option["default"], option["default"] or None):
        reason = trainer.other_defaults.get(option["name"])
        return "unsorted: default" if reason is None else f"other default: {reason}"
    return "same"


@pytest.mark.parametrize(("trainer", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_option_is_sorted(trainer: Trainer, name: str) -> None:
    options = [o for o in trainer.options if o["scripts"] == "every script" or name in o["scripts"]]
    assert len(options) > 100
    sorted_options = {o["name"]: sort_option(trainer, SCRIPTS[name], o) for o in options}
    unsorted = {option: how for option, how in sorted_options.items() if how.startswith("unsorted")}
    assert not unsorted, f"{name} takes these otherwise than {trainer.name}; say how in this file: {unsorted}"
    assert "same" in sorted_options.values()


def test_a_new_option_or_value_is_shown_as_unsorted() -> None:
    script = SCRIPTS[MUSUBI_TUNER.scripts[0]]
    for option, how in (
        ({"name": "brand_new", "default": None}, "refused"),
        ({"name": "network_alpha", "default": 2.0}, "default"),
        ({"name": "save_precision", "default": None, "choices": ["fp8"]}, "refuses ['fp8']"),
    ):
        assert sort_option(MUSUBI_TUNER, script, option) == f"unsorted: {how}"


# What the tables in library/options/names say of other programs' settings, and where users read it.

ROOT = Path(__file__).parents[2]
ALL_SCRIPTS = list_scripts()
OPTIONS = {name for script in ALL_SCRIPTS for name in script.options.defaults()} | LecoOptions.defaults().keys()
ARGUMENTS = {
    name
    for kind in list_kinds()
    for group in (*COMMON, *kind.wrappers, kind.arguments)
    for name in list_declared(group)
} | {"algo", "dora_wd", "wd_on_output"}
LETTERS = {declared.letters for declared in list_declared(PromptSpec).values()}
TARGETS = ("option", "key", "argument", "optimizer", "prompt", "none")
ENTRIES = [entry for program in list_programs() for entry in read_program(program).values()]
FLAT = ("diffusers", "simpletuner", "onetrainer", "lora_easy")
USUAL_OF_DIFFUSERS = {
    "instance_data_dir": "use image_dir in the dataset file",
    "class_data_dir": "use image_dir and is_reg = true in the dataset file",
    "instance_prompt": "use class_tokens in the dataset file",
    "class_prompt": "use class_tokens and is_reg = true in the dataset file",
    "with_prior_preservation": "use is_reg in the dataset file",
    "num_class_images": "prompt and num",
    "dataset_name": "use dataset_name in the dataset file",
    "caption_column": "use caption_column in the dataset file",
    "repeats": "use num_repeats in the dataset file",
    "center_crop": "use --random_crop, its opposite",
    "random_flip": "use --flip_aug",
    "rank": "use --network_dim",
    "lora_alpha": "use --network_alpha",
    "lora_dropout": "use --network_dropout",
    "use_dora": "use --network_args dora_wd=true",
    "train_text_encoder": "use --network_train_unet_only, its opposite",
    "num_train_epochs": "use --max_train_epochs",
    "snr_gamma": "use --min_snr_gamma",
    "checkpointing_steps": "use --save_every_n_steps and --save_state",
    "checkpoints_total_limit": "use --save_last_n_steps, in steps",
    "resume_from_checkpoint": "use --resume, or --autoresume for the latest",
    "report_to": "use --log_with",
    "validation_prompt": "use --sample_prompts, a file with a prompt a line",
    "validation_epochs": "use --sample_every_n_epochs",
    "allow_tf32": "use --cuda_allow_tf32",
}


def error_of(script: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(importlib.import_module(script.removesuffix(".py")).setup_parser(), words)
    return capsys.readouterr().err


def find_faults(entry: Equivalent, names: Collection[str]) -> list[str]:
    """Return what an entry of a table with these `names` refers to that does not exist."""
    checks = {
        "one target": len([target for target in TARGETS if getattr(entry, target)]) == 1,
        "option": {*entry.options} <= OPTIONS,
        "key": entry.key in {"", *ALL_KEYS},
        "argument": entry.argument in {"", *ARGUMENTS},
        "prompt": entry.prompt in {"", *LETTERS},
        "beside": entry.beside.keys() <= OPTIONS | ALL_KEYS.keys() | ARGUMENTS,
        "convert": entry.convert in {"", *CONVERSIONS},
        "only_with": {part.strip("!").partition("=")[0] for part in entry.only_with.split(" & ")} <= {*names, ""},
        "words": {*re.findall(r"--(\w+)", entry.none + entry.note)} <= OPTIONS | LETTERS,
    }
    return [check for check, is_right in checks.items() if not is_right]


@pytest.mark.parametrize("program", list_programs())
def test_every_name_leads_to_something_that_exists(program: str) -> None:
    known = {*read_names(program), *read_whole_program(program).list_defaults(""), "script"}
    faults = {name: find_faults(entry, known) for name, entry in read_program(program).items()}
    assert {name: found for name, found in faults.items() if found} == {}
    assert find_faults(Equivalent("x", "y", option="none_such", key="image_dir"), ()) == ["one target", "option"]
    spaced = Equivalent("x", "y", key="image_dir", only_with="kind=A B")  # a word with a space is one word
    assert find_faults(spaced, {"kind"}) == [] and find_faults(spaced, ()) == ["only_with"]


def test_every_conversion_is_used() -> None:
    assert {entry.convert for entry in ENTRIES if entry.convert} == CONVERSIONS.keys()


@pytest.mark.parametrize("program", ["sd_scripts", "musubi_tuner"])
def test_the_table_has_the_options_that_its_contract_lists(program: str) -> None:
    listed = dict[str, Any]()
    for option in json.loads((DATA / f"options_{program}.json").read_text(encoding="utf-8")):
        scripts = () if option["scripts"] == "every script" else option["scripts"]
        since, before = listed.get(option["name"], (option.get("since", ""), scripts))
        listed[option["name"]] = since, tuple(sorted({*before, *scripts})) if before and scripts else ()
    table = read_program(program)
    of_training = {name: entry for name, entry in table.items() if entry.options == [name]}
    others = {name for name in of_training if name in ("prompts_file", "max_denoising_steps")}
    others |= {name for name in of_training if name == "leco_denoise_guidance_scale"}
    assert {n: (e.since, tuple(e.scripts)) for n, e in of_training.items() if n not in others} == listed
    assert all(entry.scripts == ["sdxl_train_leco.py", "train_leco.py"] for n in others if (entry := table[n]))


@pytest.mark.parametrize(("name", "answer"), USUAL_OF_DIFFUSERS.items())
def test_the_usual_options_of_diffusers_get_the_right_answer(
    name: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_of("sdxl_train_network.py", [f"--{name}", "1"], capsys)
    assert f"--{name} (" in message and answer in message, message


@pytest.mark.parametrize("program", FLAT)
def test_every_foreign_name_is_answered_from_the_table(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = next(script for script in ALL_SCRIPTS if script.name == "flux_train_network.py")
    parser = importlib.import_module("flux_train_network").setup_parser()
    foreign = [name for name in read_program(program) if "." not in name and name not in OPTIONS]
    abbreviations = [name for name in foreign if parser._get_option_tuples(f"--{name}")]
    assert len(foreign) > 5 and {*abbreviations} <= {"controlnet", "fa"}  # sd-scripts takes these too
    for name in sorted({*foreign} - {*abbreviations}):
        message = error_of(script.name, [f"--{name}", "not-a-number"], capsys)
        answer = read_program(program)[name].describe(script.options.defaults(), has_note=False)
        assert f"--{name} (" in message and answer in message, message


def test_a_config_file_is_answered_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.toml").write_text("num_train_epochs = 3\nlora_rank = 8")
    parse(importlib.import_module("train_network").setup_parser(), ["--config_file", str(tmp_path / "run.toml")])
    assert "ignored: num_train_epochs (use --max_train_epochs)" in caplog.text
    assert "ignored: lora_rank (use --network_dim)" in caplog.text


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("folder_path", "use image_dir"),
        ("caption_ext", "use caption_extension"),
        ("instance_data_dir", "use image_dir"),
    ],
)
def test_keys_of_other_data_sets_are_answered(key: str, answer: str) -> None:
    assert explain_key(key).startswith(answer)


def test_network_arguments_are_answered() -> None:
    with pytest.raises(UserError, match="there is no argument lora_rank; use --network_dim"):
        read_groups(COMMON, {"lora_rank": "8"})


def test_a_name_that_programs_use_differently_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of("train_network.py", ["--repeats", "2"], capsys)
    assert "diffusers: use num_repeats in the dataset file" in message and "SimpleTuner: use num_repeats" in message


@pytest.mark.parametrize("script", ["train_network.py", "flux_train_network.py", "train_leco.py"])
def test_the_json_says_what_sd_scripts_has(script: str) -> None:
    from tools.capabilities import describe_options

    in_json = {option.name: option.in_sd_scripts for option in describe_options(script)}
    listed = json.loads((DATA / "options_sd_scripts.json").read_text(encoding="utf-8"))
    has = {o["name"] for o in listed if o["scripts"] == "every script" or script in o["scripts"]}
    has |= {"prompts_file", "max_denoising_steps", "leco_denoise_guidance_scale"} if "leco" in script else set()
    assert in_json == {name: name in has for name in in_json}
    assert has_option("sd_scripts", script, "config_file")


@pytest.mark.parametrize(
    ("heading", "program"), [("## Same number, other meaning", "sd_scripts"), ("## musubi-tuner", "musubi_tuner")]
)
def test_the_page_of_differences_names_options_that_the_table_has(heading: str, program: str) -> None:
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    section = page.partition(heading)[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    flags = {flag for cell in first_cells for flag in re.findall(r"`--(\w+)", cell)}
    others = {"ratios", "concat", "lbws", "clamp_quantile", "svd_lowrank_niter", "edit"}  # of tools; of ours
    assert len(flags) > 1 and flags - others <= read_program(program).keys()


def test_a_usual_start_reads_no_table() -> None:
    code = f"""
import sys; sys.argv = ["train_network.py", "--help"]
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import train_network
try: train_network.setup_parser().parse_args(["--network_dim", "4"]), train_network.setup_parser().parse_args()
except SystemExit: pass
assert not [path for path in opened if {str(FOLDER)!r} in path], opened
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
