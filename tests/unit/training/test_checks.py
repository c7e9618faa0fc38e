"""Errors and warnings raised before anything is loaded, also for training on prompts alone."""

import importlib
import logging
import re
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.flux.options import FluxModelOptions, FluxOptions
from library.architectures.sd3.options import Sd3TrainingOptions
from library.architectures.sdxl.options import SdxlOptions
from library.base.errors import UserError
from library.checkpoints.folders import ADDED_TO_NAMES, LONGEST_ON_WINDOWS, atomic_folder
from library.data.sources.storage.object_storage import SIGNED, URL
from library.options.base import group
from library.options.kinds import TEXT
from library.options.leco import LecoOptions, leco_options, list_ignored_by_leco, list_refused_by_leco
from library.options.machine.compiling import CompileOptions
from library.options.model import ModelOptions
from library.options.ranges import check_ranges
from library.options.requirements import unsupported
from library.options.train import TrainOptions
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions
from library.options.training.optimizer import ScheduleOptions
from library.training.command_line import checks, option_checks
from library.training.command_line.checks import check, report_unused, warn_of_fp16_vae
from library.training.command_line.cli import parse
from library.training.command_line.doubtful import AOTRITON
from library.training.command_line.opened_base import open_base
from library.training.command_line.option_checks import check_values
from library.training.failures.out_of_memory import Sizes, find_savings
from library.training.models.block_running import compile_settings
from library.training.optimization.optimizers import build_optimizer
from library.training.saving.names import Names, state_folder

NEEDED = {
    "pretrained_model_name_or_path": "owner/model",
    "train_data_dir": ".",
    "resolution": "512",
    "network_module": "networks.lora",
    "output_dir": "output",
    "learning_rate": 1e-4,
}


@dataclass(frozen=True)
class AllOptions(TrainOptions):
    """Options including the groups that only some scripts have."""

    flux: FluxModelOptions = group(FluxModelOptions)
    sd3: Sd3TrainingOptions = group(Sd3TrainingOptions)


UNSUPPORTED = [
    name for name, declared in AllOptions.declarations().items() if declared.unsupported and not declared.needs.names
]


def make_options(**values: Any) -> TrainOptions:
    """Return valid options, changed by `values`."""
    unknown = values.keys() - AllOptions.defaults().keys()
    assert not unknown, unknown
    return AllOptions.from_args(Namespace(**{**AllOptions.defaults(), **NEEDED, **values}))


def warnings_of(caplog: pytest.LogCaptureFixture, **values: Any) -> list[str]:
    with caplog.at_level(logging.WARNING):
        check(make_options(**values))
        report_unused(make_options(**values), {})
    return [record.message for record in caplog.records]


def refusal_of(**values: Any) -> str:
    with pytest.raises(ValueError) as refused:
        check(make_options(**values))
    return str(refused.value)


@pytest.mark.parametrize(("of_script", "is_warned"), [("no", True), ("bf16", False)])
def test_a_precision_set_only_for_the_launcher_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, of_script: str, is_warned: bool
) -> None:
    """Some programs pass it to accelerate launch but not to the script, which then trains in float32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    warnings = [line for line in warnings_of(caplog, mixed_precision=of_script) if "accelerate launch" in line]
    assert len(warnings) == is_warned and all("give --mixed_precision fp16 to the script" in line for line in warnings)


def test_a_plain_run_passes_without_warnings(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog) == []


def test_a_dataset_class_needs_no_folder_and_no_resolution() -> None:
    described = {"train_data_dir": None, "resolution": None}
    assert refusal_of(**described).startswith("no images are named")
    check(make_options(**described, dataset_class="torch.utils.data.Dataset"))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_option_stops_the_run(name: str) -> None:
    default = AllOptions.defaults()[name]
    value = {bool: True, float: 0.5}.get(type(default), 5)
    if default is None and AllOptions.declarations()[name].kind is TEXT:
        value = "text"
    assert refusal_of(**{name: value}).startswith(f"--{name} is not supported: ")


def test_all_unsupported_options_are_listed_in_one_message() -> None:
    lines = refusal_of(zero_stage=3, deepspeed=True).splitlines()
    assert [line.split()[0] for line in lines] == ["--deepspeed", "--zero_stage"]


@pytest.mark.parametrize("nothing", [None, False, "", 0, 0.0])
def test_an_unsupported_option_left_empty_by_a_front_end_passes(nothing: Any) -> None:
    assert not unsupported(make_options(**dict.fromkeys(UNSUPPORTED, nothing)))


@pytest.mark.parametrize("steps", [0, -1])
def test_disabled_previews_pass(steps: int) -> None:
    assert not unsupported(make_options(sample_every_n_steps=steps, sample_every_n_epochs=steps))


def test_deepspeed_names_its_other_options_too() -> None:
    assert "--offload_param_device" in refusal_of(deepspeed=True, offload_param_device="cpu", zero_stage=2)
    assert "--zero_stage" not in refusal_of(deepspeed=True, offload_param_device="cpu", zero_stage=2)
    of_deepspeed = [declared for declared in AllOptions.declarations().values() if "deepspeed" in declared.needs.names]
    assert len(of_deepspeed) == 8 and all(declared.unsupported for declared in of_deepspeed)


@pytest.mark.parametrize("flag", ["--base_format", "--blocks_to_swap", "--optimizer_type", "--num_processes"])
def test_the_replacement_for_deepspeed_is_named(flag: str) -> None:
    assert flag in refusal_of(deepspeed=True, offload_optimizer_device="cpu")


@pytest.mark.parametrize(
    "values",
    [
        {"noise_offset_random_strength": True, "noise_offset": 0.1},
        {"huber_c": 0.2, "loss_type": "huber"},
        {"huber_scale": 2.0, "loss_type": "smooth_l1", "huber_schedule": "exponential"},
        {"save_last_n_epochs": 2, "save_n_epoch_ratio": 4},
        {"save_last_n_steps": 100, "save_every_n_steps": 10},
        {"save_last_n_steps_state": 100, "save_state": True, "save_every_n_steps": 10},
        {"skip_cache_check": True, "cache_latents": True, "cache_latents_to_disk": True},
        {"initial_step": 0},
        {"bucket_no_upscale": True, "enable_bucket": True},
        {"zero_terminal_snr": True, "v_parameterization": True},
        {"dynamo_backend": "no"},
        {"text_encoder_lr": [1e-5]},
        {"adaptive_noise_scale": 0.0},
        {"v_parameterization": True, "v_pred_like_loss": 0.0},
    ],
)
def test_an_option_with_an_effect_does_not_warn(caplog: pytest.LogCaptureFixture, values: dict[str, Any]) -> None:
    assert warnings_of(caplog, **values) == []


def test_a_rank_together_with_dim_from_weights_warns(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    weights = tmp_path / "a.safetensors"
    weights.touch()
    warnings = warnings_of(caplog, dim_from_weights=True, network_weights=str(weights), network_dim=4)
    assert len(warnings) == 1 and "--network_dim" in warnings[0]


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "network_module", "output_dir", "resolution"])
@pytest.mark.parametrize("nothing", [None, ""])
def test_a_missing_setting_is_named(name: str, nothing: str | None) -> None:
    assert refusal_of(**{name: nothing}).startswith(f"--{name} is not set")


def test_the_error_for_a_run_without_images_says_how_to_name_them() -> None:
    message = refusal_of(train_data_dir=None)
    assert "--dataset_config" in message and "--train_data_dir" in message


def test_dataset_config_needs_no_resolution_and_no_other_folder(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.touch()
    check(make_options(train_data_dir="nowhere", resolution=None, dataset_config=path))


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"resume": "own"}, "--resume own does not exist"),
        ({"resume": __file__}, "is a file; name a folder"),
        ({"base_weights": [".", "a"]}, "--base_weights a does not exist"),
        ({"in_json": "."}, "is a folder; name a file"),
        ({"resume": "user/repo", "resume_from_huggingface": True}, None),
        ({"sample_prompts": "none.txt"}, None),
        ({"clip_l": "none", "cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}, None),
        ({"clip_l": "none", "cache_text_encoder_outputs": True}, "--clip_l none does not exist"),
        ({"clip_l": "none", "model_type": "chroma"}, None),
    ],
)
def test_paths_that_a_run_reads_must_exist(values: dict[str, Any], wrong: str | None) -> None:
    options = FluxOptions().with_values(values)
    with pytest.raises(UserError, match=wrong) if wrong else nullcontext():
        check_values(options)


def test_debug_dataset_needs_no_model_and_no_output() -> None:
    check(make_options(debug_dataset=True, network_module=None, pretrained_model_name_or_path=None, output_dir=None))


def test_more_multipliers_than_files_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "a.safetensors"
    weights.touch()
    assert "2 values for 1" in refusal_of(base_weights=[str(weights)], base_weights_multiplier=[1.0, 0.5])


def test_a_training_adapter_is_not_merged_too_and_changes_no_text_encoder(tmp_path: Path) -> None:
    files = {}
    for module in ("lora_unet_layers_0_attention_to_q", "lora_te_layers_0_self_attn_q_proj"):
        files[module] = str(tmp_path / f"{module}.safetensors")
        weights = {f"{module}.lora_down.weight": torch.ones(2, 8), f"{module}.lora_up.weight": torch.ones(8, 2)}
        save_file(weights, files[module])
    file, of_encoder = files.values()
    check(make_options(training_adapter=f"{file}:0.5", base_weights=[of_encoder]))
    same = Path(file).parent / ".." / tmp_path.name / Path(file).name
    message = refusal_of(training_adapter=f"{file}:0.5", base_weights=[of_encoder, str(same)])
    assert f"--training_adapter {file} is also a file of --base_weights" in message
    assert f"--training_adapter {of_encoder} changes a text encoder" in refusal_of(training_adapter=of_encoder)
    assert "the strength is nan" in refusal_of(training_adapter=f"{file}:nan")


def test_an_unusable_audit_path_is_refused_before_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--output_dir" in refusal_of(audit_only=True, output_dir=str(tmp_path / "file" / "below"))
    check(make_options(audit_only=True, network_module=None, pretrained_model_name_or_path=None, output_dir=None))


def test_fp16_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "has_accelerator", lambda: False)
    assert "bf16" in refusal_of(mixed_precision="fp16")
    monkeypatch.setattr(checks, "has_accelerator", lambda: True)
    check(make_options(mixed_precision="fp16", full_fp16=True, optimizer_type="AdamW8bit"))


def test_rules_refer_to_existing_options() -> None:
    option_names = AllOptions.defaults().keys()
    declared = AllOptions.declarations().values()
    named = {need.partition("=")[0] for f in declared for need in f.needs.names} | {
        f.unless for f in declared if f.unless
    }
    assert len(named) > 10 and named - {"cache_text_encoder_outputs_to_disk"} <= option_names


def test_a_learning_rate_too_low_to_train_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warnings_of(caplog, learning_rate=2e-6, network_dim=8)
    assert "--learning_rate is 2e-06" in line and "1e-4" in line
    caplog.clear()
    (line,) = warnings_of(caplog, learning_rate=2e-6, optimizer_type="Lion", network_alpha=4, network_dim=4)
    assert "3e-5 is usual with Lion" in line and "--network_alpha" not in line
    caplog.clear()
    for values in ({"unet_lr": 1e-4}, {"optimizer_type": "Prodigy"}, {"network_train_text_encoder_only": True}):
        assert not any("far too low" in line for line in warnings_of(caplog, learning_rate=2e-6, **values))


@pytest.mark.parametrize(
    ("values", "strength"),
    [
        ({"network_dim": 32}, "1/32"),
        ({"network_dim": 64, "network_alpha": 2}, "1/32"),
        ({"network_dim": 256, "network_args": ["rslora=True"]}, "1/16"),
        ({"network_dim": 8}, None),
        ({"network_dim": 32, "network_alpha": 16}, None),
        ({"network_dim": 32, "network_alpha": 0}, None),  # the rank
        ({"network_dim": 32, "network_module": "networks.oft"}, None),
        ({"network_dim": 32, "network_module": "lycoris.kohya", "network_args": ["algo=lokr"]}, None),
        ({"network_dim": 32, "optimizer_type": "Prodigy"}, None),
    ],
)
def test_an_alpha_far_below_the_rank_is_warned_about(
    caplog: pytest.LogCaptureFixture, values: dict[str, Any], strength: str | None
) -> None:
    lines = [line for line in warnings_of(caplog, **values) if "--network_alpha is" in line]
    assert [f"acts at {strength} of its strength" in line for line in lines] == ([True] if strength else [])


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({"learning_rate": 1e-2}, ["learning_rate"]),
        ({"learning_rate": 100.0, "optimizer_type": "Lion8bit"}, ["learning_rate"]),
        ({"unet_lr": 1e-2, "text_encoder_lr": [1e-4, 5e-3]}, ["unet_lr", "text_encoder_lr"]),
        ({"learning_rate": 1e-3}, []),
        ({"learning_rate": 1.0, "optimizer_type": "Prodigy"}, []),
        ({"learning_rate": 1e-2, "optimizer_type": "SGD"}, []),
    ],
)
def test_a_learning_rate_that_destroys_an_adapter_is_warned_about(
    values: dict[str, Any], flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    lines = [line for line in warnings_of(caplog, **values) if "destroys an adapter" in line]
    assert [line.split(" is ")[0].removeprefix("--") for line in lines] == flags


def test_previews_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --w wide")
    previews = {"sample_at_first": True, "sample_prompts": str(path)}
    assert f"{path}, line 1: width (--w) is 'wide'" in refusal_of(**previews)
    path.write_text("a cat")
    check(make_options(**previews))
    assert "--sample_sampler is 'eular' (did you mean euler?)" in refusal_of(**previews, sample_sampler="eular")
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        check(make_options(sample_every_n_steps=2, sample_prompts="none.txt"))


@pytest.mark.parametrize(
    "times", [{"sample_every_n_steps": 5}, {"sample_every_n_epochs": 1}, {"sample_at_first": True}]
)
@pytest.mark.parametrize("prompts", [None, ""])
def test_previews_without_prompts_are_warned_about(
    caplog: pytest.LogCaptureFixture, times: dict[str, Any], prompts: str | None
) -> None:
    (warning,) = warnings_of(caplog, **times, sample_prompts=prompts)
    assert "--sample_prompts" in warning


def test_previews_by_epochs_and_by_steps_warn_which_one_is_used(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat")
    warnings = warnings_of(caplog, sample_every_n_steps=5, sample_every_n_epochs=1, sample_prompts=str(path))
    assert warnings == ["--sample_every_n_steps has no effect with --sample_every_n_epochs"]


def train_weight(optimizer_type: str, dtype: torch.dtype) -> torch.Tensor:
    """Return weights that start at 0 after 20 steps with gradients of about 1e-4."""
    rate = 1.0 if optimizer_type == "Prodigy" else 1e-4
    weight = torch.nn.Parameter(torch.zeros(64, 4, dtype=dtype))
    options = make_options(optimizer_type=optimizer_type, learning_rate=rate).optimizer
    optimizer = build_optimizer(options, [{"params": [weight], "lr": rate}]).optimizer
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        weight.grad = (1e-4 * torch.randn(64, 4, generator=generator)).to(dtype)
        optimizer.step()
    return weight.detach().float()


@pytest.mark.parametrize("name", ["AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "AdamWScheduleFree", "Prodigy"])
def test_optimizers_that_break_in_full_fp16_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Their weights become NaN, end far from the float32 result, or do not move."""
    monkeypatch.setattr(checks, "has_accelerator", lambda: True)
    message = refusal_of(full_fp16=True, mixed_precision="fp16", optimizer_type=name)
    assert "--full_fp16" in message and name in message and "AdamW8bit" in message
    half, single = train_weight(name, torch.float16), train_weight(name, torch.float32)
    is_broken = not half.isfinite().all() or half.norm() > 5 * single.norm() or half.norm() < 0.2 * single.norm()
    assert is_broken


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion"])
def test_optimizers_recommended_for_full_fp16_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Weights move as far as in float32. Lion uses signs, which rounding flips near 0, so norms are compared."""
    monkeypatch.setattr(checks, "has_accelerator", lambda: True)
    check(make_options(full_fp16=True, mixed_precision="fp16", optimizer_type=name))
    assert float(train_weight(name, torch.float16).norm()) == pytest.approx(
        float(train_weight(name, torch.float32).norm()), rel=0.05
    )


def test_adafactor_with_full_fp16_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checks, "has_accelerator", lambda: True)
    (line,) = warnings_of(caplog, full_fp16=True, mixed_precision="fp16", optimizer_type="Adafactor")
    assert "--full_fp16" in line and "Adafactor" in line


def test_a_vae_that_overflows_in_fp16_is_warned_about_unless_it_runs_in_float32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_fp16_vae(ModelOptions(), "fp16")
    assert "--no_half_vae" in caplog.text
    caplog.clear()
    warn_of_fp16_vae(ModelOptions(no_half_vae=True), "fp16")
    warn_of_fp16_vae(ModelOptions(), "bf16")
    assert caplog.text == ""


@pytest.mark.parametrize("flag", ["output_dir", "logging_dir"])
def test_a_file_given_as_a_folder_is_refused(tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in refusal_of(**{flag: str(tmp_path / "file" / "out")})


def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    monkeypatch.setattr(checks.os, "access", lambda path, mode: Path(path) != folder)  # root can write anywhere
    assert f"nothing can be written in {folder}" in refusal_of(output_dir=str(folder / "a" / "b"))


def test_output_names_that_clash_with_existing_files_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.safetensors").mkdir()
    assert "is a folder" in refusal_of(output_dir=str(tmp_path), output_name="mine")
    (tmp_path / "old.safetensors").write_text("")
    (line,) = warnings_of(caplog, output_dir=str(tmp_path), output_name="old")
    assert "will be overwritten" in line


def test_a_name_that_no_file_system_supports_is_refused() -> None:
    assert "too long" in refusal_of(output_name="ä" * 120)


def test_a_state_with_the_longest_accepted_name_can_be_written(tmp_path: Path) -> None:
    """A state has a longer name while it is being written."""
    most, _ = checks.path_limits(tmp_path)
    name = "m" * (most - len("-step00000000-state") - ADDED_TO_NAMES)
    check(make_options(output_dir=str(tmp_path), output_name=name))
    with atomic_folder(state_folder(Names(tmp_path, name, "safetensors").of_step(10**8 - 1))) as folder:
        (folder / checks.FILE_OF_STATE).write_text("")
    assert f"have names of {most + 1}, but {most} are possible" in refusal_of(output_name=f"{name}m")


def test_paths_that_are_too_long_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_path = tmp_path.joinpath(*["x" * 200] * 25)
    assert re.search(
        r"--output_dir .*paths of 5\d+ characters, but this system takes 4095", refusal_of(output_dir=str(long_path))
    )
    windows = tmp_path / ("x" * (150 - len(str(tmp_path))))
    monkeypatch.setattr(checks, "path_limits", lambda folder: (255, LONGEST_ON_WINDOWS))
    added = len("-step00000000-state") + ADDED_TO_NAMES + len(checks.FILE_OF_STATE) + 2
    check(make_options(output_dir=str(windows), output_name="m" * (258 - 150 - added)))
    assert "takes 259; use a shorter --output_dir or --output_name, or on Windows enable long" in refusal_of(
        output_dir=str(windows), output_name="m" * (259 - 150 - added)
    )


@pytest.mark.parametrize("name", ["cat/m", "../m", "/tmp/m", "cat\\m", "C:m", "C:\\out\\m", "m/", "cat/../m"])
def test_a_name_that_contains_a_folder_is_refused(name: str) -> None:
    message = refusal_of(output_name=name)
    assert message.startswith(f"--output_name {name} holds a path") and "--output_dir" in message


@pytest.mark.parametrize("name", [".", "..", " ", " . "])
def test_a_name_without_letters_is_refused(name: str) -> None:
    assert refusal_of(output_name=name).startswith(f"--output_name is {name!r}; give a name with letters or digits")


@pytest.mark.parametrize("name", ["m", "my cat.v2", "学習", ".hidden", "m-000001", None, ""])
def test_a_plain_name_is_accepted(name: str | None) -> None:
    check(make_options(output_name=name))


@pytest.mark.parametrize("name", ["cpu_offload_checkpointing", "gradient_checkpointing_every"])
def test_recomputation_options_without_recomputation_are_warned_about(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    value = 2 if name.endswith("every") else True
    assert f"--{name} has no effect without --gradient_checkpointing" in "\n".join(warnings_of(caplog, **{name: value}))
    caplog.clear()
    assert not [
        line for line in warnings_of(caplog, unsloth_offload_checkpointing=True, **{name: value}) if name in line
    ]


@pytest.mark.parametrize("name", ["vae", "pretrained_model_name_or_path", "resume", "dataset_config", "sample_prompts"])
def test_a_url_with_a_password_is_refused_without_showing_it(name: str) -> None:
    message = refusal_of(**{name: "https://user:s3cr3t@host.example/x.safetensors"})
    assert message.startswith(f"--{name} has a URL with a password, https://…@host.example") and "s3cr3t" not in message


@pytest.mark.parametrize(("capability", "is_warned"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_bf16_on_a_gpu_without_support_is_warned_about(
    capability: tuple[int, int], is_warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    lines = [line for line in warnings_of(caplog, mixed_precision="bf16") if "Tesla T4 has no units for bf16" in line]
    assert bool(lines) is is_warned


@pytest.mark.parametrize(
    ("architecture", "value", "is_warned"),
    [("gfx1100", "", True), ("gfx1100", "1", False), ("gfx942:sramecc+:xnack-", "", False)],
)
def test_experimental_attention_of_rocm_is_named_once(
    architecture: str, value: str, is_warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "RX 7900 XTX")
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setenv(AOTRITON, value)
    lines = [line for line in warnings_of(caplog) if line.startswith("RX 7900 XTX: ")]
    assert len(lines) == is_warned
    assert all("math form, which keeps all scores" in line and f"Set {AOTRITON}=1" in line for line in lines)


@pytest.mark.parametrize(
    ("mode", "compiled", "is_warned"),
    [
        ("default", None, False),
        ("reduce-overhead", None, True),
        ("max-autotune", "max-autotune-no-cudagraphs", True),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs", False),
    ],
)
def test_compile_modes_with_cuda_graphs_are_compiled_without_them(
    mode: str, compiled: str | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert compile_settings(CompileOptions(compile=True, compile_mode=mode)).mode == compiled
    assert ("uses CUDA graphs" in caplog.text) is is_warned


@pytest.mark.parametrize("pattern", [option_checks.PASSWORD, SIGNED, URL], ids=["PASSWORD", "SIGNED", "URL"])
@pytest.mark.parametrize("unit", ["a", "a:", "a@", "://:", "x-amz-"], ids=repr)
def test_the_search_for_secrets_takes_time_in_proportion_to_the_text(unit: str, pattern: re.Pattern[str]) -> None:
    """Small texts first: a search in quadratic time would take hours for a megabyte."""

    def seconds(num_letters: int) -> float:
        text = unit * (num_letters // len(unit))
        start = time.process_time()
        assert pattern.search(text) is None
        return time.process_time() - start

    assert seconds(20_000) < 0.2
    half = seconds(500_000)
    assert seconds(1_000_000) < 4 * half + 0.1


# Option values out of range are refused before anything is loaded.


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [("lr_scheduler_min_lr_ratio", 2.0, "use 0 to 1"), ("lr_scheduler_power", -1.0, "use at least 0")],
)
def test_a_schedule_number_out_of_range_is_named(name: str, value: float, fix: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is {value}; .*{fix}"):
        check_ranges(ScheduleOptions(**{name: value}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (FlowSamplingOptions(sigmoid_scale=-1.0), "--sigmoid_scale is -1.0; use at least 0"),
        (FlowSamplingOptions(discrete_flow_shift=0.0), "--discrete_flow_shift is 0.0; use a number above 0"),
        (FlowWeightingOptions("logit_normal", logit_std=-0.1), "--logit_std is -0.1; use at least 0"),
        (FlowWeightingOptions("mode", mode_scale=2.0), "--mode_scale is 2.0; use at most 1.75"),
        (Sd3TrainingOptions(training_shift=-3.0), "--training_shift is -3.0; use a number above 0"),
    ],
)
def test_a_number_that_gives_no_valid_noise_levels_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_ranges(options)


# Scripts that train on prompts alone: their options, refusals before anything is loaded, and help.

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


def make_concept_options(prompts: Path | None, **values: Any) -> Any:
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
    assert make_concept_options(prompts).network.network_train_unet_only
    check(make_concept_options(prompts))


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_need_images_or_epochs_are_refused_with_a_fix(prompts: Path, name: str) -> None:
    value = VALUES.get(name, True if SDXL_LECO.defaults()[name] is False else 2)
    with pytest.raises(
        ValueError, match=f"^--{name} does not work with --prompts_file: .*; (leave it out|use --|train)"
    ):
        check(make_concept_options(prompts, **{name: value}))


def test_a_prompt_file_is_required() -> None:
    with pytest.raises(ValueError, match="--prompts_file is not set; give the TOML file"):
        check(make_concept_options(None))


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_an_invalid_number_of_denoising_steps_is_refused(prompts: Path, steps: int) -> None:
    with pytest.raises(ValueError, match=f"--max_denoising_steps is {steps}; use at"):
        check(make_concept_options(prompts, max_denoising_steps=steps))


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
        report_unused(make_concept_options(prompts, **numbers), {})
    matches = [re.match(r"--(\w+) has no effect: ", record.message) for record in caplog.records]
    assert {match[1] for match in matches if match} >= numbers.keys() and len(numbers) > 20


def test_a_vae_is_used_only_for_previews(prompts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report_unused(
            make_concept_options(prompts, vae="vae.safetensors", sample_prompts="p.txt", sample_every_n_steps=1), {}
        )
        assert not caplog.records
        report_unused(make_concept_options(prompts, vae="vae.safetensors"), {})
    assert "--vae has no effect: images are neither encoded nor drawn" in caplog.text


def test_a_base_sharded_by_accelerate_is_refused(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    build: Any = None
    with pytest.raises(ValueError, match="accelerate is configured for FSDP2, which means --shard_base: the processes"):
        open_base(make_concept_options(prompts), build)


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

    options = make_concept_options(prompts)
    lines = list(
        find_savings(
            options.flat(), Sizes(10**9, 0, 0, 10**6), torch.device("cpu"), ignored=list_ignored_by_leco(type(options))
        )
    )
    assert any(line.startswith("--gradient_checkpointing ") for line in lines)
    assert "a smaller batch_size in the --prompts_file needs as much less for activations" in lines
    assert not [line for line in lines for name in IGNORED if line.startswith(f"--{name} ")]
