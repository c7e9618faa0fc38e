"""The runs of --sweep equal runs of their own command, however they are started, stopped and continued."""

import json
import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.runner import list_commands
from flux_train_network import FluxNetworkTrainer, setup_parser
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.training.report_page.page import read_data
from library.training.report_page.writer import read_report
from tests.running import ROOT, Finished, make_images
from tests.tiny.bases import BASES
from tests.unit.data.builders import full_disk, unwritable

Train = Callable[..., Finished]
SCRIPT = "flux_train_network"
VARYING = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return arguments for three steps of FLUX.1 and its text encoder."""
    make_images(tmp_path / "data" / "1_thing", 5, seed=71)
    return [
        *BASES["flux"].build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--output_name",
        "mine", "--network_module", "networks.lora_flux", "--network_alpha", "2", "--learning_rate", "0.5",
        "--optimizer_type", "SGD", "--seed", "8", "--max_data_loader_n_workers", "0", "--max_train_steps", "3",
        "--save_precision", "float", "--no_report", "--max_grad_norm", "0.2",
    ]  # fmt: skip


def assert_same_files(one: Path, other: Path, has_layers: bool = True) -> None:
    """Assert that two files have the same bits and the same metadata but for times."""
    actual, wanted = load_state_dict(one), load_state_dict(other)
    assert actual.keys() == wanted.keys() and all(torch.equal(actual[key], wanted[key]) for key in wanted)
    metadata, others = read_metadata(one), read_metadata(other)
    assert {key for key in metadata.keys() | others.keys() if metadata.get(key) != others.get(key)} <= VARYING
    changes = [float(tensor.abs().max()) for key, tensor in wanted.items() if "lora_up" in key or not has_layers]
    assert max(changes) > 1e-4


def commands_of(done: Finished) -> dict[str, list[str]]:
    """Return the command of each run that a sweep has logged, by label."""
    lines = [line.partition("--sweep: run ")[2] for line in done.stderr.splitlines() if "--sweep: run " in line]
    parts = [line.partition(", ")[2].partition(": ") for line in lines]
    return {label: shlex.split(command) for label, _, command in parts}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_run_equals_the_one_of_its_own_command(train: Train, words: list[str], tmp_path: Path) -> None:
    """With caches that the runs share, dropout, a trained text encoder, and a seed for each."""
    swept = ["--sweep", "network_dim=2,3", "seed=4,5", "--network_dropout", "0.2", "--cache_latents"]
    done = train([*words, *swept, "--validation_split", "0.4"], SCRIPT).ok()
    names = {f"mine-dim{dim}-seed{seed}.safetensors" for dim in "23" for seed in "45"}
    assert files_in(tmp_path / "out") == names, "shared caches and events are gone"
    command = commands_of(done)["dim3-seed5"]
    assert "--validation_seed 8" in " ".join(command) and "--network_alpha 3.0" in " ".join(command)
    name = "mine-dim3-seed5.safetensors"
    (tmp_path / "out").rename(tmp_path / "swept")
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert_same_files(tmp_path / "swept" / name, tmp_path / "out" / name)
    assert files_in(tmp_path / "out") == {name}


def test_runs_that_are_not_finite_end_alone(train: Train, words: list[str], tmp_path: Path) -> None:
    more = ["--max_grad_norm", "0", "--on_nonfinite", "stop", "--network_train_unet_only"]
    done = train([*words, *more, "--sweep", "learning_rate=1e38,0.5"], SCRIPT).ok()
    assert "lr1e38 ended, because its losses were not finite. The other runs go on" in done.stderr
    assert (tmp_path / "out" / "mine-lr0.5.safetensors").exists()
    assert not (tmp_path / "out" / "mine-lr1e38.safetensors").exists()
    done = train([*words, *more, "--output_name", "bad", "--sweep", "learning_rate=1e38,2e38"], SCRIPT)
    assert done.status == 1


def test_worse_runs_end_in_their_round_and_all_are_ranked(train: Train, words: list[str], tmp_path: Path) -> None:
    """A learning rate that is far too high soon gives NaN losses."""
    more = [
        "--sweep", "learning_rate=1e-3,1e6,2e-3", "--sweep_stop_after", "1", "--max_grad_norm", "0",
        "--validation_split", "0.5", "--validate_every_n_steps", "2", "--max_train_steps", "5",
        "--log_events", str(tmp_path / "events.jsonl"), "--network_train_unet_only",
    ]  # fmt: skip
    done = train([word for word in [*words, *more] if word != "--no_report"], SCRIPT).ok()
    assert "lr1e6 ends after step 2: another one was significantly better" in done.stderr
    out = tmp_path / "out"
    assert read_metadata(out / "mine-lr1e6.safetensors")["ss_steps"] == "2"
    labels = ["lr1e-3", "lr1e6", "lr2e-3"]
    expected = {f"mine-{label}{end}" for label in labels for end in (".safetensors", "-report.html")}
    assert files_in(out) == {*expected, "mine-sweep.html", "index.html"}, "the states of pauses are deleted"
    page = read_data((out / "mine-sweep.html").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in page["rows"]}
    assert page["rows"][-1]["label"] == "lr1e6" and rows["lr1e6"]["compared"]["is_worse"]
    assert [run["label"] for run in page["runs"]] == list(page["chosen"]) == labels
    assert rows["lr1e-3"]["step"] == 5 and rows["lr1e6"]["step"] == 2 and page["num_pictures"] == 2
    for label in labels:
        lines = [json.loads(line) for line in (tmp_path / f"events-{label}.jsonl").read_text().splitlines()]
        assert len([line for line in lines if line["event"] == "step"]) == rows[label]["step"]
        assert read_report(out / f"mine-{label}-report.html").plan is not None
    before = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    again = train([word for word in [*words, *more] if word != "--no_report"], SCRIPT)
    assert again.status == 0 and "avr_loss" not in again.stderr, again.stderr
    assert before == {path: path.read_bytes() for path in out.glob("*.safetensors")}
    plain = [*words, "--learning_rate", "2e-3", "--output_name", "own", "--validation_seed", "8", *more[4:-3]]
    assert train([*plain, "--network_train_unet_only"], SCRIPT).status == 0
    swept, own = (load_state_dict(out / f"{name}.safetensors") for name in ("mine-lr2e-3", "own"))
    assert all(torch.equal(swept[key], own[key]) for key in own), "a paused run continues exactly"


def test_early_stopping_ends_one_run(train: Train, words: list[str], tmp_path: Path) -> None:
    more = [
        "--sweep", "learning_rate=1000,1e-3", "--early_stop_patience", "1", "--validation_split", "0.6",
        "--validate_every_n_steps", "1", "--max_train_steps", "5", "--network_train_unet_only",
    ]  # fmt: skip
    done = train([*words, *more], SCRIPT).ok()
    assert "run 2 of 2" in done.stderr and "early stopping (--early_stop_patience)" in done.stderr
    assert files_in(tmp_path / "out") == {"mine-lr1000.safetensors", "mine-lr1e-3.safetensors"}
    assert int(read_metadata(tmp_path / "out" / "mine-lr1000.safetensors")["ss_steps"]) < 5
    again = train([*words, *more], SCRIPT)
    assert again.status == 0 and "avr_loss" not in again.stderr, again.stderr


def test_rounds_need_a_validation_from_their_step_on(train: Train, words: list[str], tmp_path: Path) -> None:
    more = [
        "--sweep", "learning_rate=0.5,1", "--sweep_stop_after", "2", "--validation_split", "0.5",
        "--validate_every_n_steps", "9", "--network_train_unet_only",
    ]  # fmt: skip
    done = train([*words, *more], SCRIPT)
    assert done.status == 1 and "no validation is scheduled from that step on" in done.stderr, done.stderr
    assert "avr_loss" not in done.stderr and not (tmp_path / "out").exists()


def test_nothing_is_ranked_where_losses_mean_other_things(train: Train, words: list[str], tmp_path: Path) -> None:
    more = ["--validation_split", "0.5", "--network_train_unet_only", "--sweep", "loss_type=l2,huber"]
    refused = train([*words, *more, "--sweep_stop_after", "1"], SCRIPT)
    assert refused.status == 1 and "loss_type changes the held-out images or what their losses mean" in refused.stderr
    done = train([*words, *more], SCRIPT)
    assert done.status == 0 and "nothing is ranked: loss_type changes" in done.stderr
    named = {f"mine-losstype{kind}.safetensors" for kind in ("l2", "huber")}
    assert files_in(tmp_path / "out") == named


def test_a_wrong_value_of_any_run_is_refused_before_the_first(train: Train, words: list[str], tmp_path: Path) -> None:
    done = train([*words, "--sweep", "conv_dim=2,x"], SCRIPT)
    assert done.status == 1 and "mine-convdimx: " in done.stderr and "run 1 of 2" not in done.stderr
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == set()


@pytest.mark.parametrize("trouble", ["read-only", "full disk", "full disk for caches"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_run(
    trouble: str, words: list[str], tmp_path: Path
) -> None:
    """With nothing left behind: no lock, no seed, no temporary folder."""
    place = tmp_path / "place"
    place.mkdir()
    room = {"read-only": unwritable(place), "full disk": full_disk(), "full disk for caches": full_disk(2000)}
    more = ["--sweep", "learning_rate=0.5,1", "--output_dir", str(place / "out"), "--cache_latents"]
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *words, *more]
    del command[(seed := command.index("--seed")) : seed + 2]
    with room[trouble]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = done.stderr
    assert done.returncode == 1 and "Traceback" not in said, said
    if trouble == "full disk for caches":
        assert "cannot be written" in said and "run 2 of 2" not in said, said
        assert files_in(place / "out") == {".mine.sweep-seed"}
    else:
        assert f"--output_dir {place / 'out'} cannot be written: " in said and "run 1 of 2" not in said, said
        assert files_in(place) == set()


IN_SWEEPS = {
    "compile": ["--compile"],
    "lycoris": ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr"],
    "selftest": ["--selftest"],
    "base_weights": ["--base_weights", "{lora}"],
    "config file": ["--config_file", "{config}"],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "config file" else pytest.mark.nightly) for case in IN_SWEEPS]
)
def test_options_work_in_a_sweep_as_in_a_run(case: str, train: Train, words: list[str], tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text('sweep = ["learning_rate=0.5,1"]\nnetwork_train_unet_only = true\n')
    lora = tmp_path / "base.safetensors"
    shape = {"lora_down": (1, 64), "lora_up": (64, 1)}
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{part}.weight": torch.ones(size) for part, size in shape.items()}, lora)
    more = [word.format(lora=lora, config=config) for word in IN_SWEEPS[case]]
    swept = [] if case == "config file" else ["--sweep", "learning_rate=0.5,1", "--network_train_unet_only"]
    done = train([*words, *swept, *more], SCRIPT).ok()
    file = tmp_path / "out" / "mine-lr1.safetensors"
    assert files_in(tmp_path / "out") == {"mine-lr0.5.safetensors", file.name}
    (tmp_path / "out").rename(tmp_path / "swept")
    subprocess.run(commands_of(done)["lr1"], check=True, capture_output=True, timeout=300)
    assert_same_files(tmp_path / "swept" / file.name, file, has_layers=case != "lycoris")


def test_a_dry_run_tries_the_first_and_the_largest(train: Train, words: list[str], tmp_path: Path) -> None:
    done = train([*words, "--sweep", "network_dim=2,5,3", "--dry_run"], SCRIPT).ok()
    assert list(commands_of(done)) == ["dim2", "dim5"] and done.stderr.count("dry run: the largest batch has") == 2
    assert not (tmp_path / "out").exists()


def test_processes_that_are_launched_are_refused_with_the_remedy(
    train: Train, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = train([*words, "--sweep", "learning_rate=1,2"], SCRIPT)
    assert done.status == 1 and '--launcher "accelerate launch --num_processes 4"' in done.stderr


@pytest.mark.nightly
def test_a_launcher_stands_before_each_run(train: Train, words: list[str], tmp_path: Path) -> None:
    launcher = f"{sys.executable} -m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1"
    train([*words, "--sweep", "learning_rate=0.5,1", "--launcher", launcher], SCRIPT).ok()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_a_program_that_calls_a_trainer_trains_a_sweep(words: list[str], tmp_path: Path) -> None:
    args = setup_parser().parse_args([*words, "--sweep", "learning_rate=0.5,1", "--network_train_unet_only"])
    FluxNetworkTrainer().train(Namespace(**vars(args)))
    assert files_in(tmp_path / "out") == {"mine-lr0.5.safetensors", "mine-lr1.safetensors"}


def test_machines_train_one_run_each(words: list[str], tmp_path: Path) -> None:
    """`xargs` starts what --sweep_list counts; a finished run is skipped, another file is refused."""
    swept = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *words, "--sweep", "learning_rate=0.5,1"]
    shown = subprocess.run([*swept, "--sweep_list", "json"], capture_output=True, text=True, timeout=300, check=True)
    (first, second), name = json.loads(shown.stdout), "mine-lr1"
    assert second["chosen"] == {"learning_rate": "1"} and (second["number"], second["name"]) == (2, name)
    assert second["command"][1:2] == swept[1:2] and name in second["command"] and name not in first["command"]
    listed = subprocess.run([*swept, "--sweep_list"], capture_output=True, text=True, timeout=300, check=True)
    assert [line.split()[:2] for line in listed.stdout.splitlines() if "learning_rate=" in line] == [
        ["1", "lr0.5"],
        ["2", "lr1"],
    ]
    xargs = ["xargs", "-P", "2", "-I", "{}", *swept, "--sweep_only", "{}"]
    subprocess.run(xargs, input="1\n2\n", text=True, capture_output=True, timeout=600, check=True)
    file = tmp_path / "out" / "mine-lr1.safetensors"
    before = file.read_bytes()
    again = subprocess.run([*swept, "--sweep_only", "2"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "is finished: it is what this run gives" in again.stderr
    other = [*swept, "--sweep_only", "2", "--max_train_steps", "2"]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 1 and "was trained with other options, steps or images" in refused.stderr
    assert file.read_bytes() == before


LONG = ["--max_train_steps", "300", "--sweep", "learning_rate=0.5,1", "--network_train_unet_only"]


@pytest.fixture
def sweeping(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process group of its own, whose first run has trained a step."""
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *words, *LONG]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        assert any("avr_loss" in line for line in process.stdout), "no step was trained"
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "SIGTERM to the sweep"])
def test_a_signal_saves_the_run_and_starts_no_other(
    sweeping: subprocess.Popen[str], to_all: bool, tmp_path: Path
) -> None:
    """A terminal's Ctrl-C reaches the whole group; `kill` reaches the sweep, which passes the signal on."""
    if to_all:
        os.killpg(sweeping.pid, signal.SIGINT)
    else:
        os.kill(sweeping.pid, signal.SIGTERM)
    said, _ = sweeping.communicate(timeout=300)
    assert sweeping.returncode == 0, said
    names = files_in(tmp_path / "out")
    assert "training was interrupted after step" in said and "run 2 of 2" not in said
    assert len([name for name in names if name.endswith("-state")]) == 1 and not any("sweep-" in n for n in names)


def test_a_sweep_whose_driver_is_killed_continues_with_the_same_command(
    sweeping: subprocess.Popen[str], words: list[str], train: Train, tmp_path: Path
) -> None:
    os.kill(sweeping.pid, signal.SIGKILL)
    assert sweeping.stdout is not None
    sweeping.wait()
    said = sweeping.stdout.read()  # until the run, which notices that its driver is gone, has ended too
    assert "the launcher of this run is gone; saving and ending" in said
    done = train([*words, *LONG], SCRIPT).ok()
    assert "resuming from" in done.stderr and not any("sweep-" in name for name in files_in(tmp_path / "out"))
    own = [*words, *LONG[:2], "--network_train_unet_only", "--output_name", "own", "--validation_seed", "8"]
    assert train(own, SCRIPT).status == 0
    swept, wanted = (load_state_dict(tmp_path / "out" / f"{name}.safetensors") for name in ("mine-lr0.5", "own"))
    assert all(torch.equal(swept[key], wanted[key]) for key in wanted)


def test_rounds_continue_after_their_driver_was_killed(train: Train, words: list[str], tmp_path: Path) -> None:
    """In the second round, when one run waits for the others; then every run equals that of its own command."""
    trained = [
        *words, "--validation_split", "0.5", "--validate_every_n_steps", "2", "--max_train_steps", "6",
        "--network_train_unet_only",
    ]  # fmt: skip
    swept = [*trained, "--sweep", "learning_rate=1e-3,1.1e-3", "--sweep_stop_after", "1"]
    command = [sys.executable, str(ROOT / f"{SCRIPT}.py"), *swept]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        starts = (line for line in process.stdout if "--sweep: run 2 of 2" in line)
        assert next(starts, None) and next(starts, None), "the second round has not begun"
        process.kill()
        process.stdout.read()  # until the run, which notices that its driver is gone, has ended too
    train(swept, SCRIPT).ok()
    assert files_in(tmp_path / "out") == {"mine-lr1e-3.safetensors", "mine-lr1.1e-3.safetensors"}
    own = [*trained, "--learning_rate", "1.1e-3", "--output_name", "own", "--validation_seed", "8"]
    assert train(own, SCRIPT).status == 0
    actual, wanted = (load_state_dict(tmp_path / "out" / f"{name}.safetensors") for name in ("mine-lr1.1e-3", "own"))
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


def test_the_state_of_an_earlier_versions_sweep_continues_as_a_single_run(
    train: Train, words: list[str], tmp_path: Path
) -> None:
    assert train([*words, "--max_train_steps", "2", "--save_state", "--network_train_unet_only"], SCRIPT).status == 0
    manifest = tmp_path / "out" / "mine-state" / "train_state.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    del content["digest"]  # which would belong to the content without the part
    content["parts"]["sweep"] = {"seed": 8, "ended": {}}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    done = train([*words, "--resume", str(manifest.parent), "--network_train_unet_only"], SCRIPT)
    assert done.status == 0 and "it continues as a single run" in done.stderr, done.stderr


# Every measurement and maker of toys starts by its name; those that no other test runs measure once in small.

# The others: test_memory_modes (gpu_step), test_compile, made_up/test_a_new_weight_format, unit/tools/test_plan_models.
SMALL = {
    "adapters": ("--rounds 1 --rank 4", "LoRA-FA"),
    "denoisers": ("--models lumina --tokens 16 --passes 1", "lumina"),
    "own_overhead": ("--steps 2 --case plain", "overhead"),
    "quickstart": ("--steps 3 --rounds 1", "x the fastest"),
    "recipe_heads": ("", "Planned at 1024 px"),
    "run_duration": ("--steps 2 --only 1", "measured / planned"),
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["benchmarks", "benchmarks.toys"])
def test_a_name_that_there_is_not_is_answered_with_those_there_are(package: str) -> None:
    done = run(package, "speed", "--device", "cuda")
    assert done.returncode == 2 and all(name in done.stderr for name in list_commands(package))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("package", "name"), [(p, name) for p in ("benchmarks", "benchmarks.toys") for name in list_commands(p)]
)
def test_its_help_has_its_own_name(package: str, name: str) -> None:
    done = run(package, name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python3 -m {package} {name} ")


@pytest.mark.nightly
@pytest.mark.parametrize("name", SMALL)
def test_it_measures_in_small(name: str) -> None:
    words, expected = SMALL[name]
    done = run("benchmarks", name, *words.split())
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
