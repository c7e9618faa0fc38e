"""Scripts that train on prompts alone: their options, refusals before anything is loaded, and help."""

import importlib
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from library.architectures.sdxl.options import SdxlOptions
from library.options.leco import LecoOptions, leco_options, list_ignored_by_leco, list_refused_by_leco
from library.training.command_line.checks import check, report_unused
from library.training.command_line.cli import parse
from library.training.command_line.opened_base import open_base
from library.training.failures.out_of_memory import Sizes, find_savings

SDXL_LECO = leco_options(SdxlOptions)
IGNORED, REFUSED = list_ignored_by_leco(SDXL_LECO), list_refused_by_leco(SDXL_LECO)
SCRIPTS = {"train_leco": LecoOptions, "sdxl_train_leco": SDXL_LECO}
VALUES = {"max_train_epochs": 3, "fit": "8GB", "sweep": ["network_dim=4,8"]}
DEFAULTS = {
    "prompts_file": None, "max_denoising_steps": 40, "leco_denoise_guidance_scale": None, "network_module":
    "networks.lora", "network_dim": 4, "network_alpha": 1.0, "network_dropout": None, "network_args": None,
    "network_weights": None, "dim_from_weights": False, "unet_lr": None, "save_model_as": "safetensors",
    "no_metadata": False, "training_comment": None, "max_train_steps": 1600, "learning_rate": 2e-6,
}  # fmt: skip
"""Options of the scripts in sd-scripts 0.11, with their defaults; where the guidance is unset it is 3 too."""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.toml"
    path.write_text('[[prompts]]\ntarget = "cat"\n')
    return path


def make_options(prompts: Path | None, **values: Any) -> Any:
    words = ["--pretrained_model_name_or_path", "model", "--output_dir", "out", "--learning_rate", "1e-4"]
    args = importlib.import_module("sdxl_train_leco").setup_parser().parse_args(words)
    for name, value in {"prompts_file": None if prompts is None else str(prompts), **values}.items():
        setattr(args, name, value)
    return SDXL_LECO.from_args(args)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_match_sd_scripts(script: str) -> None:
    args = importlib.import_module(script).setup_parser().parse_args([])
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS


def test_only_the_denoiser_is_trained_regardless_of_the_options(prompts: Path) -> None:
    assert make_options(prompts).network.network_train_unet_only
    check(make_options(prompts))


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_need_images_or_epochs_are_refused_with_a_fix(prompts: Path, name: str) -> None:
    value = VALUES.get(name, True if SDXL_LECO.defaults()[name] is False else 2)
    with pytest.raises(
        ValueError, match=f"^--{name} does not work with --prompts_file: .*; (leave it out|use --|train)"
    ):
        check(make_options(prompts, **{name: value}))


def test_a_prompt_file_is_required() -> None:
    with pytest.raises(ValueError, match="--prompts_file is not set; give the TOML file"):
        check(make_options(None))


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_an_invalid_number_of_denoising_steps_is_refused(prompts: Path, steps: int) -> None:
    with pytest.raises(ValueError, match=f"--max_denoising_steps is {steps}; use at"):
        check(make_options(prompts, max_denoising_steps=steps))


def test_every_option_without_effect_exists_and_is_warned_about(
    prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    defaults = SDXL_LECO.defaults()
    numbers = {
        name: (value or 0) + 1
        for name, value in defaults.items()
        if name in IGNORED.keys() - REFUSED.keys() and isinstance(value, bool | int | float)
    }
    with caplog.at_level(logging.WARNING):
        report_unused(make_options(prompts, **numbers), {})
    matches = [re.match(r"--(\w+) has no effect: ", record.message) for record in caplog.records]
    assert {match[1] for match in matches if match} >= numbers.keys() and len(numbers) > 20


def test_a_vae_is_used_only_for_previews(prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_unused(make_options(prompts, vae="vae.safetensors", sample_prompts="p.txt", sample_every_n_steps=1), {})
        assert not caplog.records
        report_unused(make_options(prompts, vae="vae.safetensors"), {})
    assert "--vae has no effect: images are neither encoded nor drawn" in caplog.text


def test_a_base_sharded_by_accelerate_is_refused(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    build: Any = None
    with pytest.raises(ValueError, match="accelerate is configured for FSDP2, which means --shard_base: the processes"):
        open_base(make_options(prompts), build)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_omits_options_without_effect_and_its_examples_parse(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = importlib.import_module(script).setup_parser()
    shown = {}
    for word in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            parse(parser, [word])
        shown[word] = capsys.readouterr().out
        options_shown = set(re.findall(r"^  --(\w+)", shown[word], re.MULTILINE))
        assert {"prompts_file", "max_denoising_steps", "network_dim", "resume"} <= options_shown
        assert not options_shown & {*IGNORED, *REFUSED}
    commands = re.findall(r"^ +python3 \S+ (.*)$", shown["--help"].replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 2 and all(parser.parse_known_args(line.split())[1] == [] for line in commands)
    programs = {action.dest for action in parser._actions}
    assert {"train_data_dir", "cache_latents"} <= programs, "config files of front ends have them"


def test_out_of_memory_advice_names_no_option_without_effect(prompts: Path) -> None:
    import torch

    options = make_options(prompts)
    lines = list(
        find_savings(
            options.flat(), Sizes(10**9, 0, 0, 10**6), torch.device("cpu"), ignored=list_ignored_by_leco(type(options))
        )
    )
    assert any(line.startswith("--gradient_checkpointing ") for line in lines)
    assert "a smaller batch_size in the --prompts_file needs as much less for activations" in lines
    assert not [line for line in lines for name in IGNORED if line.startswith(f"--{name} ")]
