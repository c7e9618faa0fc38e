"""The parts of --sweep that start and judge runs, without training."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from library.architectures.scripts import script_of
from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.data.sources.storage.storage import Storage
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.options.training.run import MAX_SEED
from library.training.command_line.sweeps import open_script
from library.training.failures.interruption import STOP_SIGNALS
from library.training.sweep.children import Children
from library.training.sweep.commands import environment_of_runs, start_script, write_command
from library.training.sweep.driver import CACHES, Sweep, check_room, find_seed, open_folder, resolve_members
from library.training.sweep.outcomes import read_outcome
from library.training.sweep.rounds import Rounds, delete_passed, delete_pause, end_at_pause, list_pauses
from library.training.sweep.worker import RunSize, Standing
from tests.running import ROOT
from tests.unit.data.builders import full_disk
from train_network import setup_parser


def options_of(folder: Path, **values: Any) -> TrainOptions:
    return TrainOptions().with_values({"output_dir": str(folder), "output_name": "cat-lr1", **values})


def test_no_part_of_the_driver_imports_torch() -> None:
    """A run needs all memory; the parts that import torch are started as processes."""
    code = "import sys, library.training.command_line.sweeps; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_command_is_read_back_as_the_options_of_its_run(tmp_path: Path) -> None:
    values = {"train_data_dir": "my photos", "network_args": ["conv_dim=4", "x=a b"], "output_name": "-odd name",
              "learning_rate": 1e-5, "text_encoder_lr": [1e-4, 0.0], "cache_latents": True}  # fmt: skip
    options = options_of(tmp_path, **values)
    script = open_script(setup_parser(), TrainOptions)
    command = write_command(script, options, None, tmp_path)
    assert command.words[:2] == [sys.executable, str(ROOT / "train_network.py")]
    assert script.read(command.words[2:]) == options and "--config_file" not in command.words


def test_what_no_command_line_can_hold_goes_into_a_file(tmp_path: Path) -> None:
    """An item of a list would be read as a flag, and a program has no command at all."""
    options = options_of(tmp_path, network_args=["--odd"])
    for has_command, own in ((True, options), (False, options_of(tmp_path, learning_rate=0.5))):
        script = open_script(setup_parser(), TrainOptions, has_command)
        words = write_command(script, own, None, tmp_path).words
        assert words[2:] == ["--config_file", str(tmp_path / "cat-lr1.toml")]
        assert (tmp_path / "cat-lr1.toml").stat().st_mode & 0o077 == 0
    assert "learning_rate = 0.5" in (tmp_path / "cat-lr1.toml").read_text()


def test_tokens_are_given_to_runs_and_hidden_in_the_log(tmp_path: Path) -> None:
    script = open_script(setup_parser(), TrainOptions)
    command = write_command(script, options_of(tmp_path, huggingface_token="hf_secret"), None, tmp_path)
    assert "hf_secret" in command.words and "hf_secret" not in command.shown


@pytest.mark.parametrize(
    ("launcher", "start"),
    [
        (None, [sys.executable]),
        ("accelerate launch --num_processes 4", ["accelerate", "launch", "--num_processes", "4"]),
        ("nice -n 10", ["nice", "-n", "10", sys.executable]),
    ],
)
def test_launchers_start_the_script_and_other_commands_start_python(launcher: str | None, start: list[str]) -> None:
    assert start_script(launcher) == start


def test_a_launcher_that_no_shell_splits_is_refused() -> None:
    with pytest.raises(UserError, match="--launcher 'a \"b' cannot be split into words"):
        start_script('a "b')


def test_runs_keep_accelerates_settings_and_lose_the_ranks_of_a_launcher() -> None:
    kept = {"ACCELERATE_MIXED_PRECISION": "bf16", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    lost = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE",
                          "PMI_RANK", "MV2_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"), "1")  # fmt: skip
    assert environment_of_runs(kept | lost) == kept


def test_rounds_double_and_need_losses_that_can_be_compared(tmp_path: Path) -> None:
    measured = options_of(tmp_path, sweep_stop_after=100, validation_split=0.1)
    rounds = Rounds.build(measured, [])
    assert rounds is not None and [rounds.next_step() for _ in range(4)] == [100, 200, 400, 800]
    assert Rounds.build(options_of(tmp_path), ["loss_type"]) is None
    with pytest.raises(UserError, match="loss_type changes the held-out images or what their losses mean"):
        Rounds.build(measured, ["loss_type"])
    with pytest.raises(UserError, match="compares runs by their validation, and there is none; set --validation_split"):
        Rounds.build(options_of(tmp_path, sweep_stop_after=100), [])


def test_only_runs_that_were_measured_after_one_step_are_compared() -> None:
    losses = {str(i): float(i) for i in range(9)}
    worse = {name: loss + 1 + 0.01 * (i % 2) for i, (name, loss) in enumerate(losses.items())}
    best, other = Standing("a", 4, 4, losses, "", None), Standing("b", 4, 4, worse, "", None)
    rounds = Rounds(4, number=1)
    assert rounds.find_worse([best, other], 2) == ["b"]
    assert rounds.find_worse([best, Standing("b", 6, 6, worse, "", None)], 2) == []


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, set()),
        ({"save_state": True}, {"cat-lr1-step00000004-state"}),
        ({"save_every_n_steps": 2}, {"cat-lr1-step00000004.safetensors"}),
    ],
)
def test_a_pause_leaves_what_the_user_has_asked_for(values: dict[str, Any], kept: set[str], tmp_path: Path) -> None:
    options, state = options_of(tmp_path, **values), tmp_path / "cat-lr1-step00000004-state"
    state.mkdir()
    (tmp_path / "cat-lr1-step00000004.safetensors").write_bytes(b"weights")
    assert list_pauses(options.saving) == [4]
    delete_passed(options.saving, options.state.save_state, 4)
    assert list_pauses(options.saving) == [4]
    end_at_pause(options.saving, options.state.save_state, 4)
    assert (tmp_path / "cat-lr1.safetensors").read_bytes() == b"weights"
    delete_pause(options.saving, options.state.save_state, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"cat-lr1.safetensors", *kept}


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_third_signal_ends_the_sweep_and_a_run_that_does_not_end(first: int, tmp_path: Path) -> None:
    """The run ignores signals, as one does whose save takes long."""
    run = "import os, signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(os.getpid(), flush=True)"
    code = f"""
import sys
from library.training.sweep.children import Children
children = Children()
with children.receiving_signals():
    children.run([sys.executable, "-c", {f"{run}; time.sleep(600)"!r}])
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as driver:  # type: ignore[call-overload]
        run_process = psutil.Process(int(driver.stdout.readline()))
        for _ in range(3):
            driver.send_signal(first)
            time.sleep(0.2)  # equal signals that wait become one
        assert driver.wait(60) == 128 + first
        assert run_process.wait(60) in (None, -signal.SIGKILL)


@pytest.mark.parametrize("reaches_all", [True, False])
def test_a_signal_of_the_terminal_is_not_passed_on_to_a_run_that_got_it(
    reaches_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows' Ctrl-Break is such a signal; no other system has it."""
    passed: list[int] = []
    children = Children()
    children._running = SimpleNamespace(send_signal=passed.append)  # type: ignore[assignment]
    monkeypatch.setattr("library.training.sweep.children.OF_TERMINALS", (signal.SIGTERM,) if reaches_all else ())
    children._receive(signal.SIGTERM, None)
    assert passed == ([] if reaches_all else [signal.SIGTERM]) and children.is_stopped


def test_the_driver_handles_the_signals_that_a_run_handles() -> None:
    with Children().receiving_signals():
        assert {signal.getsignal(number).__name__ for number in STOP_SIGNALS} == {"_receive"}  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written_is_named_before_the_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file.out cannot be written"):
        open_folder(options_of(tmp_path / "file" / "out"), seed=1)


def test_a_full_disk_keeps_no_damaged_seed(tmp_path: Path) -> None:
    """The same command would draw another one, and train other runs."""
    with full_disk(), pytest.raises(UserError, match=r"--output_dir .* cannot be written: .*; make room"):
        open_folder(options_of(tmp_path), seed=1)
    assert not list(tmp_path.iterdir())


def test_any_seed_serves_the_validation_too(tmp_path: Path) -> None:
    """A drawn seed has 32 bits."""
    (tmp_path / "1_thing").mkdir()
    options = options_of(tmp_path, sweep=["network_dim=2,4"], train_data_dir=str(tmp_path), resolution="64")
    for member in resolve_members(options, MAX_SEED):
        (dataset,) = load_dataset_config(member.options).datasets
        assert {subset.validation_seed for subset in dataset.subsets} == {MAX_SEED}


def sweep_of(folder: Path, **values: Any) -> Sweep:
    """A sweep of three ranks of FLUX.1 that has begun."""
    kind = script_of("flux").options
    given = {"sweep": ["network_dim=2,8,4"], "output_dir": str(folder), "output_name": "cat-lr1", **values}
    options, script = kind().with_values(given), open_script(setup_parser(), kind)
    return Sweep(script, options, 1, resolve_members(options, 1), folder=folder / "sweep-1")


@pytest.mark.parametrize(
    ("values", "shared"),
    [
        ({}, set()),
        ({"cache_latents": True}, {"cache_latents"}),
        ({"cache_latents": True, "cache_text_encoder_outputs": True}, {"cache_latents", "cache_text_encoder_outputs"}),
        ({"cache_latents": True, "cache_latents_to_disk": True, "cache_text_encoder_outputs": True}, set()),
    ],
)
def test_runs_share_what_they_would_cache_in_memory(values: dict[str, Any], shared: set[str], tmp_path: Path) -> None:
    """Through a temporary folder; caches on the disk have places of their own."""
    sweep = sweep_of(tmp_path, **values)
    completed = [sweep.complete(member, None) for member in sweep.members]
    (place,) = {options.caching.shared_cache_dir for options in completed}
    assert place is None if not shared else Path(str(place)).parent == tmp_path / "sweep-1"
    on_disk = shared or {name for name in CACHES if f"{name}_to_disk" in values}
    assert all({name for name in CACHES if o.flat()[f"{name}_to_disk"]} == on_disk for o in completed)


def test_the_first_and_the_largest_run_test_themselves(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, selftest=True)
    tested = [sweep.complete(member, None).diagnostics.selftest for member in sweep.members]
    assert [member.label for member in sweep.members] == ["dim2", "dim8", "dim4"] and tested == [True, True, False]


def test_a_drawn_seed_is_kept_and_stands_in_every_command(tmp_path: Path) -> None:
    options = options_of(tmp_path, sweep=["network_dim=2,4"])
    seed = find_seed(options)
    open_folder(options, seed)
    assert find_seed(options) == seed, "the same command continues the same runs"
    script = open_script(setup_parser(), TrainOptions)
    for member in resolve_members(options, seed):
        words = write_command(script, member.options, None, tmp_path).words
        assert words[words.index("--seed") + 1] == words[words.index("--validation_seed") + 1] == str(seed)


def test_caches_without_room_are_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    storage = Storage(shared_cache_dir=str(tmp_path / "caches"))
    storage.check_shared_room("latents", 1)
    with pytest.raises(UserError, match=r"latents take .* are free on its disk; make room, or put --output_dir on"):
        storage.check_shared_room("latents", 10**18)


def test_room_for_the_files_of_all_runs_is_checked_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, sweep=["network_dim=2,4"])
    members = resolve_members(options, 1)
    free = SimpleNamespace(free=10**6)
    monkeypatch.setattr("library.training.sweep.driver.shutil.disk_usage", lambda folder: free)
    sizes = [RunSize(10**6, 5 * 10**5), RunSize(2 * 10**6, 6 * 10**5)]
    with pytest.raises(
        UserError, match=r"--output_dir .* has 1.0 MB free, and the files of 2 runs take 3.0 MB; make room"
    ):
        check_room(members, sizes, None)
    (tmp_path / "cat-lr1-dim4.safetensors").touch()  # finished
    check_room(members, sizes, None)
    with pytest.raises(UserError, match="and their states, which --sweep_stop_after keeps between rounds"):
        check_room(members, sizes, Rounds(4))


def test_the_outcome_of_a_run_is_that_of_its_last_process(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    lines = [
        {"event": "start"}, {"event": "validation", "step": 2, "losses": {"a": 1.0, "b": None}},
        {"event": "end", "reason": "stopped", "step": 2}, {"event": "start", "time": 9.0},
        {"event": "end", "reason": "error", "step": 3, "cause": "non-finite"},
    ]  # fmt: skip
    events.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"event": "en')
    outcome = read_outcome(SavingOptions(), str(events))
    assert (outcome.reason, outcome.step, outcome.measured_step) == ("error", 3, 2)
    assert outcome.losses == {"a": 1.0, "b": None} and outcome.ended == "its losses were not finite"
    assert read_outcome(options_of(tmp_path).saving, None).reason is None
    later = read_outcome(SavingOptions(), str(events), since=10.0)
    assert (later.reason, later.cause, later.step) == (None, None, 0), "a process that fails early leaves old events"
