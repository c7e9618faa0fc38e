"""--sweep: names, options, refused values, and how runs are started and judged."""

import json
import logging
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
from library.training.sweep.combinations import describe_sweep, expand_combinations, find_unranked, parse_word
from library.training.sweep.commands import environment_of_runs, start_script, write_command
from library.training.sweep.driver import CACHES, Sweep, check_room, find_seed, open_folder, resolve_members
from library.training.sweep.outcomes import read_outcome
from library.training.sweep.rounds import Rounds, delete_passed, delete_pause, end_at_pause, list_pauses
from library.training.sweep.worker import RunSize, Standing
from tests.running import ROOT
from tests.unit.data.builders import full_disk
from train_network import setup_parser


def options_of(*sweep: str, **values: object) -> TrainOptions:
    values_given = {"output_dir": "out", "output_name": "cat", "network_module": "networks.lora", "sweep": list(sweep)}
    return TrainOptions().with_values({**values_given, **values})


def test_every_combination_has_a_name_and_its_options() -> None:
    words = ("learning_rate=5e-5,1e-4", "network_dim=8,16", "optimizer_args.betas=0.9,0.99|0.8,0.9", "conv_dim=none,4")
    combinations = expand_combinations(options_of(*words, optimizer_args=["eps=1e-6"], network_args=["verbose=True"]))
    assert len(combinations) == 16
    assert combinations[0].label == "lr5e-5-dim8-betas0.9_0.99-convdimnone"
    last = combinations[-1].options
    assert last.saving.output_name == "cat-lr1e-4-dim16-betas0.8_0.9-convdim4"
    assert (last.optimizer.learning_rate, last.network.network_dim) == (1e-4, 16)
    assert last.optimizer.optimizer_args == ["eps=1e-6", "betas=0.8,0.9"]
    assert last.network.network_args == ["verbose=True", "conv_dim=4"] and last.sweep.sweep is None
    assert combinations[0].options.network.network_args == ["verbose=True"]


def test_paths_and_dotted_names_are_shortened_in_file_names() -> None:
    words = (
        "network_module=networks.lora,networks.loha",
        "network_weights=a/one.safetensors,none",
        "lr_warmup_steps=9%,3",
    )
    assert [combination.label for combination in expand_combinations(options_of(*words))][:2] == [
        "lora-from_one-warmup9pct",
        "lora-from_one-warmup3",
    ]


def test_every_run_has_events_and_a_log_of_its_own() -> None:
    runs = expand_combinations(options_of("seed=3,4", seed=1, log_events="e/x.jsonl", console_log_file="x.log"))
    assert [run.options.run.seed for run in runs] == [3, 4]
    assert [run.options.reports.log_events for run in runs] == ["e/x-seed3.jsonl", "e/x-seed4.jsonl"]
    assert [run.options.console.console_log_file for run in runs] == ["x-seed3.log", "x-seed4.log"]


def test_switches_lists_and_values_with_spaces_are_swept() -> None:
    words = ("cache_latents=true,False", "base_weights='a b.safetensors' c.safetensors|d", "text_encoder_lr=1 2,0")
    first, *_, last = (run.options for run in expand_combinations(options_of(*words)))
    assert (first.caching.cache_latents, last.caching.cache_latents) == (True, False)
    assert first.network.base_weights == ["a b.safetensors", "c.safetensors"] and last.network.base_weights == ["d"]
    assert first.network.text_encoder_lr == [1, 2] and last.network.text_encoder_lr == [0]
    with pytest.raises(UserError, match="--sweep cache_latents: 'maybe' is no value of --cache_latents: it is true or"):
        expand_combinations(options_of("cache_latents=maybe,true"))


def test_words_that_change_what_a_loss_means_are_found() -> None:
    words = ["learning_rate=1,2", "seed=1,2", "conv_dim=1,2", "optimizer_args.eps=1,2", "blocks_to_swap=1,2"]
    assert find_unranked(options_of(*words)) == []
    changing = ["resolution", "min_snr_gamma", "noise_offset", "prior_loss_weight", "train_data_dir", "base_weights",
                "pretrained_model_name_or_path", "validation_split", "loss_type", "vae"]  # fmt: skip
    assert find_unranked(options_of(*(f"{name}=1,2" for name in changing))) == changing


@pytest.mark.parametrize("name", ["output_dir", "resume", "sweep_only", "launcher", "dry_run", "logging_dir"])
def test_what_a_run_writes_and_how_it_starts_cannot_be_swept(name: str) -> None:
    with pytest.raises(UserError, match=f"--sweep {name}: it says what a run writes, where it starts or how it is"):
        expand_combinations(options_of(f"{name}=1,2"))


def test_a_million_combinations_are_counted_and_refused() -> None:
    words = [f"{name}={','.join(str(value + 1) for value in range(100))}" for name in ("network_dim", "network_alpha")]
    words.append("seed=" + ",".join(map(str, range(100))))
    with pytest.raises(UserError, match="--sweep names 1000000 runs; at most 1000 can be trained by one command"):
        expand_combinations(options_of(*words))


def test_sweeping_a_rate_that_other_rates_replace_is_refused() -> None:
    with pytest.raises(UserError, match="learning_rate has no effect with --unet_lr"):
        expand_combinations(options_of("learning_rate=1e-4,1e-3", unet_lr=1e-4, network_train_unet_only=True))


def alphas(*words: str, **values: object) -> list[tuple[float, list[str] | None]]:
    """Return --network_alpha and --network_args of each adapter of a sweep."""
    combinations = expand_combinations(options_of(*words, **values))
    return [
        (combination.options.network.network_alpha, combination.options.network.network_args)
        for combination in combinations
    ]


def test_swept_ranks_keep_the_strength_given_by_the_options() -> None:
    """alpha / rank is that of --network_alpha and --network_dim; the first rank replaces a missing one."""
    assert alphas("network_dim=4,16", network_dim=8, network_alpha=4) == [(2, None), (8, None)]
    assert alphas("network_dim=4,16", network_alpha=4) == [(4, None), (16, None)]
    assert alphas("network_dim=4,16", network_dim=8, network_alpha=0) == [(0, None), (0, None)]  # 0 is the rank


def test_a_swept_alpha_is_unchanged() -> None:
    results = alphas("network_dim=4,16", "network_alpha=1,2", network_dim=8, network_alpha=4)
    assert [alpha for alpha, _ in results] == [1, 2, 1, 2]
    assert alphas("network_dim=4,16", "network_alpha=1") == [(1, None), (1, None)]


def test_convolutions_keep_their_strength_if_their_rank_is_swept() -> None:
    args = ["conv_dim=8", "conv_alpha=2"]
    assert alphas("conv_dim=4,16", network_alpha=4, network_args=args) == [
        (4, ["conv_dim=4", "conv_alpha=1"]),
        (4, ["conv_dim=16", "conv_alpha=4"]),
    ]
    assert alphas("conv_dim=4,16") == [(1, ["conv_dim=4"]), (1, ["conv_dim=16", "conv_alpha=4"])]
    assert alphas("conv_dim=4,16", "conv_alpha=3", network_args=args)[1] == (1, ["conv_dim=16", "conv_alpha=3"])


def test_the_rank_of_convolutions_follows_a_swept_rank_with_its_strength() -> None:
    args = ["conv_dim=8", "conv_alpha=2"]
    with_dim: dict[str, object] = {"network_dim": 16, "network_alpha": 8, "network_args": args}
    assert alphas("network_dim=4,16", **with_dim) == [(2, ["conv_dim=2", "conv_alpha=0.5"]), (8, args[1:] + args[:1])]
    assert alphas("network_dim=4,16", network_alpha=4, network_args=args[:1]) == [
        (4, ["conv_dim=8"]),
        (16, ["conv_dim=32", "conv_alpha=4"]),
    ]
    assert alphas("network_dim=4,16", "conv_dim=3", **with_dim)[0] == (2, ["conv_dim=3", "conv_alpha=0.75"])
    assert alphas("network_dim=4,16", "conv_alpha=3", **with_dim)[0] == (2, ["conv_alpha=3", "conv_dim=2"])
    unchanged = ["conv_dim=0"]
    assert alphas("network_dim=4,16", network_args=unchanged) == [(1, unchanged), (4, unchanged)]
    assert alphas("network_dim=1,16", network_dim=16, network_args=["conv_dim=4", "rslora=True"])[0][1] == [
        "rslora=True",
        "conv_dim=1",
    ]


@pytest.mark.parametrize("values", [{"network_module": "networks.oft"}, {"network_args": ["rslora=True"]}])
def test_alpha_is_unchanged_if_alpha_over_rank_is_not_the_strength(values: dict[str, object]) -> None:
    assert [alpha for alpha, _ in alphas("network_dim=4,16", network_dim=8, network_alpha=4, **values)] == [4, 4]


def test_the_alpha_of_each_rank_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        options = options_of("network_dim=4,16", "seed=1,2", network_alpha=2, network_args=["conv_dim=8"])
    swept = dict(parse_word(item, options) for item in options.sweep.sweep or ())
    described = describe_sweep(options.network, swept, expand_combinations(options))
    lines = [line for line in described if not line.startswith("--sweep:")]
    assert lines == [
        "--sweep network_dim keeps alpha / rank at 0.5: alpha 2 at rank 4, alpha 8 at rank 16; add "
        "network_alpha=VALUE to --sweep to set alpha yourself",
        "--sweep conv_dim keeps alpha / rank at 0.125: alpha 1 at rank 8, alpha 4 at rank 32; add conv_alpha=VALUE to "
        "--sweep to set alpha yourself",
        "--sweep network_dim takes conv_dim along: 8 at rank 4, 32 at rank 16; add conv_dim=VALUE to --sweep to set it "
        "yourself",
    ]


def test_an_option_that_the_sweep_replaces_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    words = ("network_dim=4,8", "network_alpha=2,3", "conv_dim=2,3", "conv_alpha=1", "max_grad_norm=1,2")
    with caplog.at_level(logging.WARNING):
        expand_combinations(options_of(*words, network_dim=16, network_args=["conv_dim=1"], max_grad_norm=0.5))
        expand_combinations(options_of("network_dim=4,8", "conv_dim=2,3", network_dim=16, network_args=["conv_dim=1"]))
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "--network_dim has no effect",
        "--network_args conv_dim has no effect",
        "--max_grad_norm has no effect",
    ]


# The parts of --sweep that start and judge runs, without training.


def driver_options(folder: Path, **values: Any) -> TrainOptions:
    return TrainOptions().with_values({"output_dir": str(folder), "output_name": "cat-lr1", **values})


def test_no_part_of_the_driver_imports_torch() -> None:
    """A run needs all memory; the parts that import torch are started as processes."""
    code = "import sys, library.training.command_line.sweeps; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_command_is_read_back_as_the_options_of_its_run(tmp_path: Path) -> None:
    values = {"train_data_dir": "my photos", "network_args": ["conv_dim=4", "x=a b"], "output_name": "-odd name",
              "learning_rate": 1e-5, "text_encoder_lr": [1e-4, 0.0], "cache_latents": True}  # fmt: skip
    options = driver_options(tmp_path, **values)
    script = open_script(setup_parser(), TrainOptions)
    command = write_command(script, options, None, tmp_path)
    assert command.words[:2] == [sys.executable, str(ROOT / "train_network.py")]
    assert script.read(command.words[2:]) == options and "--config_file" not in command.words


def test_what_no_command_line_can_hold_goes_into_a_file(tmp_path: Path) -> None:
    """An item of a list would be read as a flag, and a program has no command at all."""
    options = driver_options(tmp_path, network_args=["--odd"])
    for has_command, own in ((True, options), (False, driver_options(tmp_path, learning_rate=0.5))):
        script = open_script(setup_parser(), TrainOptions, has_command)
        words = write_command(script, own, None, tmp_path).words
        assert words[2:] == ["--config_file", str(tmp_path / "cat-lr1.toml")]
        assert (tmp_path / "cat-lr1.toml").stat().st_mode & 0o077 == 0
    assert "learning_rate = 0.5" in (tmp_path / "cat-lr1.toml").read_text()


def test_tokens_are_given_to_runs_and_hidden_in_the_log(tmp_path: Path) -> None:
    script = open_script(setup_parser(), TrainOptions)
    command = write_command(script, driver_options(tmp_path, huggingface_token="hf_secret"), None, tmp_path)
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
    measured = driver_options(tmp_path, sweep_stop_after=100, validation_split=0.1)
    rounds = Rounds.build(measured, [])
    assert rounds is not None and [rounds.next_step() for _ in range(4)] == [100, 200, 400, 800]
    assert Rounds.build(driver_options(tmp_path), ["loss_type"]) is None
    with pytest.raises(UserError, match="loss_type changes the held-out images or what their losses mean"):
        Rounds.build(measured, ["loss_type"])
    with pytest.raises(UserError, match="compares runs by their validation, and there is none; set --validation_split"):
        Rounds.build(driver_options(tmp_path, sweep_stop_after=100), [])


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
    options, state = driver_options(tmp_path, **values), tmp_path / "cat-lr1-step00000004-state"
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
        open_folder(driver_options(tmp_path / "file" / "out"), seed=1)


def test_a_full_disk_keeps_no_damaged_seed(tmp_path: Path) -> None:
    """The same command would draw another one, and train other runs."""
    with full_disk(), pytest.raises(UserError, match=r"--output_dir .* cannot be written: .*; make room"):
        open_folder(driver_options(tmp_path), seed=1)
    assert not list(tmp_path.iterdir())


def test_any_seed_serves_the_validation_too(tmp_path: Path) -> None:
    """A drawn seed has 32 bits."""
    (tmp_path / "1_thing").mkdir()
    options = driver_options(tmp_path, sweep=["network_dim=2,4"], train_data_dir=str(tmp_path), resolution="64")
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
    options = driver_options(tmp_path, sweep=["network_dim=2,4"])
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
    options = driver_options(tmp_path, sweep=["network_dim=2,4"])
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
    assert read_outcome(driver_options(tmp_path).saving, None).reason is None
    later = read_outcome(SavingOptions(), str(events), since=10.0)
    assert (later.reason, later.cause, later.step) == (None, None, 0), "a process that fails early leaves old events"
