"""Setting up and ending a run: steps, windows, the report of an error, and the line about a file."""

import argparse
import errno
import logging
from bdb import BdbQuit
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.saving import save_safetensors
from library.options.output.saving import HubOptions
from library.options.train import TrainOptions
from library.options.training.run import RunOptions
from library.processes.process_group import Processes
from library.training.command_line.cli import CommandLine
from library.training.command_line.main import OUR_FAULT, report_error
from library.training.evaluation import preview
from library.training.models import opening
from library.training.models.base_model import hash_module
from library.training.models.opening import choose_seed
from library.training.run.optimization import allow_fp16_gradients, name_groups
from library.training.saving.checkpoints import Writer
from library.training.saving.hub import Uploads
from library.training.saving.names import Names
from library.training.saving.readers import readers_line
from library.training.saving.schedule import Schedule
from library.training.step.accumulation import StepPlan
from networks.core.protocol import AdoptedNetwork
from tests.running import Finished


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        ({"dit": "x.safetensors", "pretrained_model_name_or_path": None}, "--dit"),
        ({"dit": None, "pretrained_model_name_or_path": "x.safetensors"}, "--pretrained_model_name_or_path"),
        ({"pretrained_model_name_or_path": "x.safetensors"}, "--pretrained_model_name_or_path"),
    ],
    ids=repr,
)
def test_the_error_names_the_base_model_flag_that_was_used(
    caplog: pytest.LogCaptureFixture, typed: dict[str, str | None], flag: str
) -> None:
    error = UserError("--pretrained_model_name_or_path x.safetensors does not exist")
    report_error(error, CommandLine(argparse.ArgumentParser(), [], argparse.Namespace(**typed), []))
    assert caplog.messages == [f"{flag} x.safetensors does not exist"]


def shown(caplog: pytest.LogCaptureFixture, error: Exception) -> list[logging.LogRecord]:
    with caplog.at_level(logging.INFO):
        try:
            raise error
        except Exception as caught:
            report_error(caught)
    return caplog.records


@pytest.mark.parametrize(
    "error",
    [
        UserError("--seed is x; use a number"),
        PermissionError(errno.EACCES, "Permission denied", "data.toml"),
        OSError(errno.ENOSPC, "No space left on device", "out/a.safetensors"),
    ],
    ids=repr,
)
def test_a_user_error_is_one_sentence_without_a_traceback(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    (record,) = shown(caplog, error)
    assert record.getMessage() == str(error) and record.exc_info is None


@pytest.mark.parametrize("make", [lambda: int("x"), lambda: dict(zip([1], [], strict=True)), lambda: {}["key"]])
def test_an_internal_error_keeps_its_traceback_and_asks_for_a_report(caplog: pytest.LogCaptureFixture, make) -> None:
    try:
        make()
    except Exception as error:
        record, advice = shown(caplog, error)
    assert record.exc_info is not None and type(record.exc_info[1]).__name__ in record.getMessage()
    assert advice.getMessage() == OUR_FAULT


NO_BUGS = {
    "numpy's": (MemoryError("Unable to allocate 3.00 GiB for an array"), "out of memory"),
    "torch's": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of m"),
    "a fork's": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    "a library's": (ImportError("libx.so: failed to map segment from shared object"), "probably out of memory"),
    "a thread's": (RuntimeError("can't start new thread"), "probably out of memory"),
    "Python's": (SystemError("error return without exception set"), "probably out of memory"),
    "a debugger's": (BdbQuit(), "the debugger ended the run"),
}


@pytest.mark.parametrize("case", NO_BUGS)
def test_memory_that_runs_out_and_a_debuggers_quit_are_no_bugs(caplog: pytest.LogCaptureFixture, case: str) -> None:
    error, start = NO_BUGS[case]
    (record,) = shown(caplog, error)
    assert record.getMessage().startswith(start) and record.exc_info is None
    if str(error):
        assert f"the error itself: {error}" in record.getMessage()


def test_thread_local_storage_that_runs_out_is_not_called_memory(caplog: pytest.LogCaptureFixture) -> None:
    shown(caplog, ImportError("libgomp.so.1: cannot allocate memory in static TLS block"))
    assert caplog.messages[-1] == OUR_FAULT


@pytest.mark.slow
@pytest.mark.parametrize("case", ["numpy's", "a debugger's"])
@pytest.mark.parametrize("place", [(opening, "open_training_data"), (preview, "draw_latents")], ids=["data", "preview"])
def test_a_run_ends_by_them_wherever_they_are_raised(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, case: str,
    place: tuple[object, str], tmp_path: Path,
) -> None:  # fmt: skip
    error, start = NO_BUGS[case]

    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(*place, fail)
    is_preview_without_memory = place[0] is preview and isinstance(error, MemoryError)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1")
    prompts = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first"]
    done = train([*base_arguments, *prompts, "--max_train_steps", "1"])
    assert done.status == (0 if is_preview_without_memory else 1), done.stderr
    assert (start in done.stderr) is not is_preview_without_memory
    assert OUR_FAULT not in done.stderr and "Traceback" not in done.stderr


# Small decisions in setting up a run.


def options_of(**values: Any) -> TrainOptions:
    parser = argparse.ArgumentParser()
    TrainOptions.add_to(parser)
    args = parser.parse_args([])
    for name, value in values.items():
        setattr(args, name, value)
    return TrainOptions.from_args(args)


def test_the_identity_depends_on_the_weights_and_not_on_their_memory_layout() -> None:
    torch.manual_seed(31)
    vae = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 1, 1), nn.Linear(3, 3, dtype=torch.bfloat16))
    identity = hash_module(vae)
    assert hash_module(vae.to(memory_format=torch.channels_last)) == identity  # type: ignore[call-overload]
    with torch.no_grad():
        vae[1].weight[0, 3] += 1e-3
    assert hash_module(vae) != identity


def test_another_precision_of_the_same_weights_changes_the_identity() -> None:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 0.5)  # exact in both
    nn.init.zeros_(layer.bias)
    assert hash_module(layer) != hash_module(layer.half())


def test_full_fp16_unscales_gradients_that_are_fp16_themselves() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    allow_fp16_gradients(scaler)
    scaler.scale((parameter.float() * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1, 2, 3]
    scaler.step(optimizer)
    assert parameter.tolist() == [0.5, 0, -0.5]


def test_a_given_seed_is_kept_and_a_random_one_is_in_numpys_range() -> None:
    assert choose_seed(0, Processes(), None) == 0
    assert all(0 <= choose_seed(None, Processes(), None) < 2**32 for _ in range(20))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"network_train_unet_only": True}, False),
        ({"text_encoder_lr": [0.0]}, False),
        ({"text_encoder_lr": [0.0, 1e-4]}, True),
        ({"learning_rate": 0.0}, False),
        ({"learning_rate": 0.0, "text_encoder_lr": [1e-5]}, True),
    ],
)
def test_text_encoders_are_trained_if_their_rate_is_not_zero(values: dict[str, Any], expected: bool) -> None:
    options = options_of(**values)
    assert options.trains_text_encoders is expected


@pytest.mark.parametrize(
    ("values", "num_groups", "expected"),
    [
        ({}, 2, ["textencoder", "unet"]),
        ({}, 3, ["group0", "group1", "group2"]),
        ({"network_train_unet_only": True}, 1, ["unet"]),
        ({"network_train_text_encoder_only": True}, 1, ["textencoder"]),
        ({"network_train_unet_only": True}, 2, ["group0", "group1"]),
    ],
)
def test_unnamed_groups_get_distinct_names(values: dict[str, Any], num_groups: int, expected: list[str]) -> None:
    options = options_of(**values)
    trains_denoiser = not options.network.network_train_text_encoder_only
    assert name_groups(num_groups, trains_denoiser, options.trains_text_encoders) == expected


# Steps, epochs and accumulation windows.


def plan(num_batches: int, accumulation: int = 1, **run: int) -> StepPlan:
    options = replace(RunOptions(), gradient_accumulation_steps=accumulation, **run)
    return StepPlan.build(options, num_batches)


def test_epochs_win_over_steps() -> None:
    assert plan(7, accumulation=2, max_train_epochs=3, max_train_steps=999).max_train_steps == 3 * 4


def test_the_default_is_1600_steps_spread_over_whole_epochs() -> None:
    p = plan(100)
    assert (p.max_train_steps, p.num_epochs) == (1600, 16)


@pytest.mark.parametrize(("num_batches", "accumulation"), [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_every_batch_of_an_epoch_is_in_one_window_and_windows_never_cross_epochs(
    num_batches: int, accumulation: int
) -> None:
    p = plan(num_batches, accumulation, max_train_epochs=2)
    for epoch in (1, 2):
        windows = list(p.windows(epoch, 0))
        assert [batch_index for window in windows for batch_index in window.batch_indices] == list(range(num_batches))
        assert [window.step for window in windows] == [(epoch - 1) * p.steps_per_epoch + i for i in range(len(windows))]
        assert all(len(window.batch_indices) == accumulation for window in windows[:-1])
        assert [window.ends_epoch for window in windows] == [False] * (len(windows) - 1) + [True]


def test_a_resumed_run_has_the_remaining_windows() -> None:
    p = plan(7, accumulation=3, max_train_steps=8)
    every = [window for epoch in p.epochs(0) for window in p.windows(epoch, 0)]
    assert [window.step for window in every] == list(range(8))
    for step in range(8):
        assert [window for epoch in p.epochs(step) for window in p.windows(epoch, step)] == every[step:]


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_several_processes_share_the_batches_of_one_process_with_more_accumulation(num_processes: int) -> None:
    shared = StepPlan.build(replace(RunOptions(), gradient_accumulation_steps=2, max_train_epochs=1), 11, num_processes)
    alone = plan(11, accumulation=2 * num_processes, max_train_epochs=1)
    assert shared == alone
    for window in shared.windows(1, 0):
        shares = [list(window.share(rank, num_processes)) for rank in range(num_processes)]
        assert sorted(batch_index for share in shares for batch_index in share) == list(window.batch_indices)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_has_its_step_and_its_number() -> None:
    p = plan(7, accumulation=3)
    assert [p.step_of(2, i) for i in range(7)] == [3, 3, 3, 4, 4, 4, 5]
    assert [p.batch_number(2, i) for i in (0, 6)] == [7, 13]


# The log line about a saved file and the programs that read it.

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LOKR = {f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lokr_w2": torch.ones(3, 4), f"{NAME}.alpha": torch.ones(())}


def test_a_third_party_lokr_file_is_recognised(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", LOKR)
    assert readers_line(list_specs(), tmp_path / "x.safetensors") == (
        "3 keys, all used by ComfyUI, Forge, A1111-style, stable-diffusion.cpp; none by diffusers"
    )


@pytest.mark.parametrize(("limit", "expected"), [(0.0, "all used by ComfyUI"), (0.1, "none by ComfyUI")])
def test_the_limit_of_an_oft_is_read_from_the_file(tmp_path: Path, limit: float, expected: str) -> None:
    tensors = {f"{NAME}.oft_blocks": torch.ones(5, 64, 64), f"{NAME}.alpha": torch.tensor(limit)}
    save_safetensors(tmp_path / "x.safetensors", tensors)
    assert expected in (readers_line(list_specs(), tmp_path / "x.safetensors") or "")


def test_other_formats_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"anything": torch.ones(2)})
    assert readers_line(list_specs(), tmp_path / "x.safetensors") is None
    assert readers_line(list_specs(), tmp_path / "x.ckpt") is None


def test_a_file_that_cannot_be_read_back_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"none")
    assert "cannot be read back" in (readers_line(list_specs(), tmp_path / "x.safetensors") or "")
    assert "cannot be read back" in (readers_line(list_specs(), tmp_path / "absent.safetensors") or "")


class Lokr(torch.nn.Module):
    """A network that only writes a file."""

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        save_safetensors(file, LOKR, metadata)


def test_the_line_is_logged_once_per_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: Future[dict[str, str]] = Future()
    done.set_result({})
    writer = Writer(
        options=TrainOptions(),
        is_main=True,
        names=Names(tmp_path, "x", "safetensors"),
        schedule=Schedule(None, None, None, None, 1),
        network=AdoptedNetwork(Lokr()),
        architecture={},
        metadata={},
        base_files=done,
        saved_weights=nullcontext,
        specs=list_specs(),
        write_state=lambda folder, step, epoch, done: None,
        uploads=Uploads(HubOptions()),
    )
    with caplog.at_level(logging.INFO, logger="library.training.saving.checkpoints"):
        writer.write(tmp_path / "one.safetensors", 1, 1)
        writer.write(tmp_path / "two.safetensors", 2, 1)
    lines = [record.getMessage() for record in caplog.records if "keys" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("one.safetensors: 3 keys, all used by ComfyUI")
