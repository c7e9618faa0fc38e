"""Setting up, saving and ending a run: steps, windows, schedules, signals, and the report of an error."""

import argparse
import errno
import logging
import os
import signal
from bdb import BdbQuit
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.saving import save_safetensors
from library.options.base import Options, group, option
from library.options.output.saving import HubOptions, SavingOptions, StateOptions
from library.options.train import TrainOptions
from library.options.training.run import RunOptions
from library.processes.process_group import Processes
from library.training.command_line.cli import CommandLine
from library.training.command_line.main import OUR_FAULT, report_error
from library.training.evaluation import preview
from library.training.failures import interruption as module
from library.training.failures.interruption import Interruption, list_stop_signals
from library.training.models import opening
from library.training.models.base_model import hash_module
from library.training.models.opening import choose_seed
from library.training.run.optimization import allow_fp16_gradients, name_groups
from library.training.saving.checkpoints import Writer, save_dtype
from library.training.saving.finished import digest_run
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
        most = max(map(len, shares))
        # Losses are exchanged batch by batch, so that they come in the order of the window.
        in_turn = [share[turn] for turn in range(most) for share in shares if turn < len(share)]
        assert in_turn == list(window.batch_indices)
        padding = [window.padding_batch(rank, num_processes) for rank in range(num_processes)]
        assert padding == [None if len(share) == most else window.batch_indices[-1] for share in shares]


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


# When a run saves and ends: schedule, signals, and the digest of a finished run.


def schedule(num_epochs: int = 10, **saving: int) -> Schedule:
    return Schedule.build(replace(SavingOptions(), **saving), num_epochs)


def test_epoch_checkpoints_leave_the_last_epoch_to_the_final_file() -> None:
    s = schedule(save_every_n_epochs=2, num_epochs=6)
    assert [e for e in range(1, 7) if s.saves_epoch(e)] == [2, 4]


def test_step_checkpoints_include_the_last_step() -> None:
    s = schedule(save_every_n_steps=5)
    assert [n for n in range(1, 16) if s.saves_step(n)] == [5, 10, 15]


@pytest.mark.parametrize(("ratio", "epochs", "every"), [(3, 10, 3), (20, 10, 1), (1, 10, 10)])
def test_ratio_divides_the_epochs_and_overrides_the_interval(ratio: int, epochs: int, every: int) -> None:
    assert schedule(num_epochs=epochs, save_n_epoch_ratio=ratio, save_every_n_epochs=7).every_n_epochs == every


def test_last_n_epochs_counts_files() -> None:
    s = schedule(save_every_n_epochs=2, save_last_n_epochs=2)
    assert [s.outdated_epoch(e) for e in (2, 4, 6, 8)] == [None, None, 2, 4]


def test_last_n_steps_is_a_distance_in_steps() -> None:
    """q - (q mod n) with q = s - k - 1: with n = 10 and k = 20 the files of the last 20 steps stay, and the newest."""
    s = schedule(save_every_n_steps=10, save_last_n_steps=20)
    assert [s.outdated_step(n) for n in (10, 20, 30, 40, 50)] == [None, None, None, 10, 20]


def test_states_are_kept_for_their_own_number_of_steps_and_epochs() -> None:
    s = schedule(save_every_n_steps=10, save_last_n_steps=20, save_every_n_epochs=1, save_last_n_epochs=3)
    assert s.for_states(StateOptions()) == s
    own = s.for_states(replace(StateOptions(), save_last_n_steps_state=40, save_last_n_epochs_state=2))
    assert (own.outdated_step(50), own.outdated_epoch(5)) == (None, 3)


def test_files_of_stops_are_deleted_by_steps_if_steps_are_saved_else_by_epochs() -> None:
    by_steps = schedule(save_every_n_steps=10, save_last_n_steps=20, save_every_n_epochs=1, save_last_n_epochs=1)
    assert [stop for stop in range(1, 41) if by_steps.outdates_stop(stop, 40, 8)] == list(range(1, 20))
    by_epochs = schedule(save_every_n_epochs=2, save_last_n_epochs=1)  # of 5 steps each
    assert [stop for stop in range(1, 41) if by_epochs.outdates_stop(stop, 40, 8)] == list(range(1, 31))
    all_stay = schedule(save_every_n_steps=10, save_every_n_epochs=1, save_last_n_epochs=1)
    assert not any(all_stay.outdates_stop(stop, 40, 8) for stop in range(1, 41))


def test_no_intermediate_checkpoint_is_saved_by_default() -> None:
    s = schedule()
    assert not any(s.saves_step(n) or s.saves_epoch(n) for n in range(1, 100))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mine", ("mine-000003.safetensors", "mine-step00000042.safetensors", "mine.safetensors")),
        (None, ("epoch-000003.safetensors", "at-step00000042.safetensors", "last.safetensors")),
    ],
)
def test_file_names_follow_the_output_name(name: str | None, expected: tuple[str, str, str]) -> None:
    names = Names.build(replace(SavingOptions(), output_dir="out", output_name=name))
    assert (names.of_epoch(3), names.of_step(42), names.of_end()) == tuple(Path("out") / file for file in expected)


@pytest.mark.parametrize("name", ["cat-251130", "cat-20251130", "cat-step5", "cat-best"])
def test_a_name_that_ends_in_a_number_is_that_of_its_own_run(name: str) -> None:
    """Its final file must not be taken for a file of another run, which may be overwritten."""
    names = Names.build(replace(SavingOptions(), output_dir="out", output_name=name))
    for path in (names.of_epoch(3), names.of_step(42), names.of_end(), names.of_best()):
        assert names.has_stem(path.stem)
    assert not Names.build(replace(SavingOptions(), output_dir="out", output_name="cat")).has_stem("cat-20251130")


def test_file_type_follows_save_model_as() -> None:
    names = Names.build(replace(SavingOptions(), output_dir="out", output_name="x", save_model_as="ckpt"))
    assert names.of_end() == Path("out/x.ckpt")


def test_an_unknown_precision_in_a_config_file_is_named() -> None:
    assert save_dtype("bf16") is torch.bfloat16
    assert save_dtype(None) is None
    with pytest.raises(ValueError, match="--save_precision is fp8"):
        save_dtype("fp8")


# The digest by which a finished run is recognised.

DATA: Any = SimpleNamespace(identity={"images": "abc"})


@dataclass(frozen=True)
class LaterOptions(Options):
    """An option that a later release adds."""

    something_new: float = option(0.5, help="Has an effect.")


@dataclass(frozen=True)
class LaterTrainOptions(TrainOptions):
    later: LaterOptions = group(LaterOptions)


def test_a_release_with_one_more_option_recognises_the_runs_of_this_one() -> None:
    assert digest_run(LaterTrainOptions(), DATA, 1) == digest_run(TrainOptions(), DATA, 1)
    used = LaterTrainOptions(later=LaterOptions(something_new=0.25))
    assert digest_run(used, DATA, 1) != digest_run(TrainOptions(), DATA, 1)


def test_options_seed_and_data_change_the_digest() -> None:
    options = TrainOptions()
    other = replace(options, optimizer=replace(options.optimizer, learning_rate=3e-5))
    elsewhere = replace(options, saving=replace(options.saving, output_name="other"))
    digest = digest_run(options, DATA, 1)
    assert digest_run(elsewhere, DATA, 1) == digest
    changed = [
        digest_run(other, DATA, 1),
        digest_run(options, DATA, 2),
        digest_run(options, SimpleNamespace(identity={"images": "abd"}), 1),
    ]
    assert digest not in changed and len(set(changed)) == 3


# The signals that a run answers by saving, on each system.

POSIX = {"SIGINT": 2, "SIGTERM": 15, "SIGHUP": 1, "SIGKILL": 9}
WINDOWS = {"SIGINT": 2, "SIGTERM": 15, "SIGBREAK": 21, "CTRL_BREAK_EVENT": 1}


def test_each_system_has_its_signals() -> None:
    assert list_stop_signals(POSIX) == (2, 15, 1)
    assert list_stop_signals(WINDOWS) == (2, 15, 21)


@pytest.mark.skipif(os.name != "posix", reason="SIGUSR1 stands for SIGBREAK")
def test_ctrl_break_saves_as_ctrl_c_does(
    fresh_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows sends it to one process group, such as that of a job in a queue."""
    former = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(module, "HANGUP", None)
    monkeypatch.setattr(module, "STOP_SIGNALS", list_stop_signals({**WINDOWS, "SIGBREAK": signal.SIGUSR1}))
    interruption = Interruption()
    interruption.install()
    interruption.defer()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert interruption.is_requested and interruption.exit_status == 128 + signal.SIGUSR1
    assert "received: finishing this step and saving" in caplog.text
