"""When a run saves and ends: schedule, signals, and the digest of a finished run."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.options.base import Options, group, option
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.training.failures import interruption as module
from library.training.failures.interruption import Interruption, list_stop_signals
from library.training.saving.checkpoints import save_dtype
from library.training.saving.finished import digest_run
from library.training.saving.names import Names
from library.training.saving.schedule import Schedule


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
    """What a later release adds."""

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
