"""What the tables in library/options/names say of other programs' settings, and where users read it."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.architectures.scripts import list_scripts
from library.base.errors import UserError
from library.data.description.dataset_file import explain_key
from library.data.description.schema import ALL_KEYS
from library.options.declared import list_declared
from library.options.leco import LecoOptions
from library.options.other_programs import CONVERSIONS, FOLDER, Equivalent, has_option, list_programs, read_program
from library.options.output.prompts import PromptSpec
from library.training.command_line.cli import parse
from networks.core.arguments.common import COMMON
from networks.core.arguments.network_arguments import read_groups
from networks.core.registry.layouts import list_kinds

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parent / "data"
SCRIPTS = list_scripts()
OPTIONS = {name for script in SCRIPTS for name in script.options.defaults()} | LecoOptions.defaults().keys()
ARGUMENTS = {
    name
    for kind in list_kinds()
    for group in (*COMMON, *kind.wrappers, kind.arguments)
    for name in list_declared(group)
} | {"dora_wd", "wd_on_output"}
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
    "dataset_name": "data sets of the hub are not read",
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


def find_faults(entry: Equivalent) -> list[str]:
    """Return what an entry names that does not exist."""
    checks = {
        "one target": len([target for target in TARGETS if getattr(entry, target)]) == 1,
        "option": {*entry.options} <= OPTIONS,
        "key": entry.key in {"", *ALL_KEYS},
        "argument": entry.argument in {"", *ARGUMENTS},
        "prompt": entry.prompt in {"", *LETTERS},
        "beside": entry.beside.keys() <= OPTIONS | ALL_KEYS.keys() | ARGUMENTS,
        "convert": entry.convert in {"", *CONVERSIONS},
        "words": {*re.findall(r"--(\w+)", entry.none + entry.note)} <= OPTIONS | LETTERS,
    }
    return [check for check, is_right in checks.items() if not is_right]


@pytest.mark.parametrize("program", list_programs())
def test_every_name_leads_to_something_that_exists(program: str) -> None:
    faults = {name: find_faults(entry) for name, entry in read_program(program).items()}
    assert {name: found for name, found in faults.items() if found} == {}
    assert find_faults(Equivalent("x", "y", option="no_such_option", key="image_dir")) == ["one target", "option"]


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
    script = next(script for script in SCRIPTS if script.name == "flux_train_network.py")
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
