"""Several processes train like one; one that is lost ends the others with its name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from tests.ranks import Job, Rank, run_ranks
from tests.running import ROOT, Finished, launch_command, make_images
from tests.tiny.bases import BASES
from tests.unit.training.test_own_files import OtherRun, other_run  # noqa: F401

Train = Callable[..., Finished]


def two_processes(arguments: list[str], count: int = 2) -> list[str]:
    """Return the command `accelerate launch --multi_gpu --num_processes 2 ...`."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count),
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(ROOT / "train_network.py"), *arguments,
    ]  # fmt: skip


def cpu_environment(use_cpu: str) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": use_cpu, "OMP_NUM_THREADS": "1"}


def launch_two(arguments: list[str], count: int = 2, use_cpu: str = "true") -> Finished:
    """Run two processes on the CPU with gloo."""
    command = two_processes(arguments, count)
    done = subprocess.run(command, capture_output=True, timeout=300, env=cpu_environment(use_cpu))
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


def launch_one(arguments: list[str]) -> Finished:
    """Run one process with the thread count of each of several, as it determines how sums are rounded."""
    command = [*launch_command("train_network.py"), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=300, env=cpu_environment("true"))
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Return arguments for nine batches per epoch, so that the last window has one batch for two processes."""
    make_images(tmp_path / "data" / "1_more", 6, seed=1)
    return [*base_arguments, "--max_train_epochs", "2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"]


@pytest.mark.nightly
def test_two_processes_equal_one_with_doubled_accumulation(arguments: list[str], tmp_path: Path) -> None:
    """Weights agree to 1e-5 of the largest after ten steps, up to the order of float32 gradient sums.

    Adam divides a gradient by its size, so rounding errors of small gradients matter as much as those of large ones.
    """
    random = ["--shuffle_caption", "--flip_aug", "--network_dropout", "0.1", "--network_args", "module_dropout=0.2"]
    random += ["--ema_decay", "0.5"]
    words = [*arguments, *random, "--cache_latents"]
    words.remove("--flip_aug")
    event_options = ["--log_events", str(tmp_path / "events.jsonl")]
    two = launch_two([*words, "--save_state", "--logging_dir", str(tmp_path / "logs"), *event_options]).ok()
    single = launch_one([*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]).ok()
    first = load_state_dict(tmp_path / "out" / "mine.safetensors")
    second = load_state_dict(tmp_path / "one" / "mine.safetensors")
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5 * float(second[key].abs().max()) + 1e-9)
    assert two.losses == single.losses
    assert "steps: 100%" in two.stderr and "10/10" in two.stderr
    assert two.stdout.count("running training") == 1
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]  # of the main process
    assert [single["step"] for single in events if single["event"] == "step"] == list(range(1, 11))
    assert [single["num_processes"] for single in events if single["event"] == "plan"] == [2]
    metadata = read_metadata(tmp_path / "out" / "mine.safetensors")
    assert metadata["ss_max_train_steps"] == "10" and metadata["ss_total_batch_size"] == "4"
    assert rates(tmp_path / "logs") == pytest.approx(
        [1e-3 * factor for factor in cosine_with_warmup(2, 10)], rel=1e-6
    )  # the schedule does not run twice as fast


def rates(folder: Path) -> list[float]:
    """Return the learning rate of each step from the TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = [path for path in folder.rglob("events.out*")]
    events = EventAccumulator(str(file.parent))
    events.Reload()
    values = [event.value for event in events.Scalars("lr/unet")]
    return [value for value, _ in groupby(values)]  # the batches of one step share one rate


def cosine_with_warmup(warmup: int, length: int) -> list[float]:
    """Return the factors of the cosine schedule before each step in closed form."""
    from math import cos, pi

    return [
        step / warmup if step < warmup else 0.5 * (1 + cos(pi * (step - warmup) / (length - warmup)))
        for step in range(length)
    ]


@pytest.mark.nightly
def test_a_state_of_two_processes_resumes_with_one(arguments: list[str], tmp_path: Path) -> None:
    """The number of batches per step stays the same, whether requested or derived."""
    launch_two([*arguments, "--save_state", "--save_every_n_steps", "4"]).ok()
    state = tmp_path / "out" / "mine-step00000004-state"
    for name, more in (("asked", ["--gradient_accumulation_steps", "2"]), ("by itself", [])):
        resumed = launch_one([*arguments, *more, "--resume", str(state), "--output_dir", str(tmp_path / name)]).ok()
        assert "a step averages as many batches as before" in resumed.stderr
        assert ("keeps the 2 batches of a step" in resumed.stderr) == (not more)
        first = load_state_dict(tmp_path / "out" / "mine.safetensors")
        second = load_state_dict(tmp_path / name / "mine.safetensors")
        for key in first:
            limit = 1e-5 * float(second[key].abs().max()) + 1e-9
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=limit)


@pytest.mark.nightly
def test_two_processes_suggest_the_same_checkpoint_as_one(arguments: list[str], tmp_path: Path) -> None:
    """Equal measurements on the validation images give the same best file and the same suggestion."""
    words = [*arguments, "--validation_split", "0.3", "--validate_at_first", "--early_stop_patience", "2"]
    words += ["--max_train_epochs", "6", "--save_every_n_epochs", "1", "--learning_rate", "0.02", "--lr_scheduler"]
    words += ["constant_with_warmup", "--keep_best_checkpoint"]
    two = launch_two(words)
    single = launch_one([*words, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")])
    assert two.status == single.status == 0, two.stderr
    messages = [re.findall(r"(?:suggested file|no file is suggested): .*", run.stderr) for run in (two, single)]
    assert messages[0] == messages[1] and len(messages[0]) == 1
    names = [sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) for name in ("out", "one")]
    assert names[0] == names[1] and "mine-best.safetensors" in names[0]


@pytest.mark.nightly
def test_each_latent_is_cached_by_one_process_only(arguments: list[str], tmp_path: Path) -> None:
    launch_two([*arguments, "--cache_latents_to_disk", "--max_train_epochs", "1"]).ok()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*_sd.npz")}
    assert len(files) == 12
    launch_two([*arguments, "--cache_latents_to_disk", "--max_train_epochs", "1"]).ok()
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*_sd.npz")}


@pytest.mark.nightly
def test_a_setup_error_is_reported_and_ends_all_processes(arguments: list[str]) -> None:
    done = launch_two([*arguments, "--network_args", "conv_rank=4"])
    assert done.status != 0
    assert "conv_rank" in done.stderr


def test_a_second_run_with_the_same_name_is_rejected_and_the_first_continues(
    train: Train,
    base_arguments: list[str],
    other_run: OtherRun,  # noqa: F811
    tmp_path: Path,
) -> None:
    process = other_run("")
    done = train(base_arguments)
    assert done.status == 1 and f"another run is writing files of this name (process {process.pid} on" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".mine.lock"]
    process.kill()
    process.wait()
    assert train(base_arguments).status == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.safetensors"]


@pytest.mark.nightly
@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a card the two find each other")
def test_two_processes_without_a_gpu_do_not_train_everything_twice(arguments: list[str], tmp_path: Path) -> None:
    done = launch_two(arguments, use_cpu="false")
    assert done.status != 0
    assert "the launcher started 2 processes, but accelerate connects only 1" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_sharing_swapped_weights_between_processes_does_not_change_training(
    arguments: list[str], tmp_path: Path
) -> None:
    words = [*arguments, "--max_train_epochs", "1"]
    plain = launch_two([*words, "--output_name", "plain"])
    swapped = launch_two([*words, "--output_name", "swapped", "--blocks_to_swap", "9"])
    assert plain.status == swapped.status == 0, swapped.stderr
    ours, theirs = (load_state_dict(tmp_path / "out" / f"{name}.safetensors") for name in ("swapped", "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found below /proc")
def test_the_surviving_process_names_the_dead_one_and_saves(arguments: list[str], tmp_path: Path) -> None:
    words = [*arguments, "--max_train_epochs", "0", "--max_train_steps", "100000"]
    with (tmp_path / "said").open("w") as log:
        launcher = subprocess.Popen(two_processes(words), env=cpu_environment("true"), stdout=log, stderr=log)
        wait_for(lambda: "2/100000" in (tmp_path / "said").read_text(), 200)
        os.kill(process_of_rank(launcher.pid, 1), signal.SIGKILL)
        wait_for(lambda: "process 1 was killed without an error message" in (tmp_path / "said").read_text(), 60)
        wait_for(lambda: list((tmp_path / "out").glob("mine*.safetensors")), 60)
        assert launcher.wait(timeout=60) != 0
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text.partition("process 1 was killed without an error message")[0]


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found below /proc")
def test_stopping_the_launcher_before_the_first_step_ends_both_processes(arguments: list[str], tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as log:
        launcher = subprocess.Popen(two_processes(arguments), env=cpu_environment("true"), stdout=log, stderr=log)
        wait_for(lambda: len(children_of(launcher.pid)) == 2, 100)
        pids = children_of(launcher.pid)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found below /proc")
def test_leftovers_of_two_killed_processes_are_deleted_at_the_next_start(arguments: list[str], tmp_path: Path) -> None:
    """The shared base model is freed at once, the latents when another run starts."""
    environment = {**cpu_environment("true"), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    words = [*arguments, "--cache_latents", "--blocks_to_swap", "9"]
    endless = [*words, "--max_train_epochs", "0", "--max_train_steps", "100000"]
    with (tmp_path / "said").open("w") as log:
        launcher = subprocess.Popen(two_processes(endless), env=environment, stdout=log, stderr=log)
        wait_for(lambda: "2/100000" in (tmp_path / "said").read_text(), 200)
        pids = [process_of_rank(launcher.pid, rank) for rank in (0, 1)]
        for pid in [launcher.pid, *pids]:
            os.kill(pid, signal.SIGKILL)
        launcher.wait(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)
    folders = [*Path("/dev/shm").iterdir(), *(tmp_path / "temporary").iterdir()]
    left = [folder.name for folder in folders if f"-{pids[0]}-" in folder.name]
    assert len(left) == 1 and left[0].startswith("latents-")
    last = [*launch_command("train_network.py"), *words, "--max_train_epochs", "0", "--max_train_steps", "1"]
    assert subprocess.run(last, env=environment, timeout=300).returncode == 0
    assert not [path.name for path in (tmp_path / "temporary").iterdir() if path.name.startswith("latents-")]


def wait_for(is_there: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.2)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def process_of_rank(launcher: int, rank: int) -> int:
    (rank_pid,) = (
        pid for pid in children_of(launcher) if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()
    )
    return rank_pid


# --shard_base: runs whose processes each keep a shard of the base model, compared with single-process runs.

Arguments = Callable[[str], list[str]]
CHANGES = ["--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9", "--learning_rate", "0.3"]
"""An optimizer that does not divide by the size of the gradient, which would blow the rounding of small ones up."""


@pytest.fixture
def sharded_arguments(tmp_path: Path) -> Arguments:
    """Build arguments for five batches per epoch and three validation images, which do not divide among processes."""
    make_images(tmp_path / "data" / "1_thing", 8, seed=91)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\na red dog --w 64 --h 64 --s 2\n")

    def of(base: str) -> list[str]:
        (tmp_path / base).mkdir()
        words = [*BASES[base].build(tmp_path / base), "--network_module", BASES[base].module, "--output_name", "mine"]
        words += ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]
        words += ["--validation_split", "0.375", "--validate_every_n_steps", "2", "--max_train_steps", "5"]
        words += ["--validate_every_n_epochs", "1"]
        words += ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3", "--seed", "92"]
        return [*words, "--max_data_loader_n_workers", "0", "--no_report", "--network_dim", "2", *CHANGES]

    return of


def run(jobs: Sequence[tuple[str, int, list[str]]], base: str, folder: Path) -> dict[str, str]:
    """Run jobs given by name, number of processes and arguments; return the main process's log of each."""
    for name, *_ in jobs:
        (folder / name).mkdir()
    all_jobs = [
        Job([*words, "--output_dir", str(folder / name / "out")], count, str(folder / name), BASES[base].script)
        for name, count, words in jobs
    ]
    results = run_ranks(all_jobs, folder)
    for (name, count, _), ranks in zip(jobs, results, strict=True):
        assert [rank.status for rank in ranks] == [0] * count, (name, [rank.said[-3000:] for rank in ranks])
    return {name: ranks[0].said for (name, *_), ranks in zip(jobs, results, strict=True)}


def relative_difference(folder: Path, ours: str, theirs: str, name: str = "mine.safetensors") -> float:
    """Return the largest weight difference, relative to the largest weight of its tensor."""
    first, second = (load_state_dict(folder / run / "out" / name) for run in (ours, theirs))
    assert first.keys() == second.keys() and len(first) > 10
    return max(float((first[k] - second[k]).abs().max() / second[k].abs().max().clamp(min=1e-12)) for k in first)


def losses(log: str) -> list[str]:
    return [line.partition("validation after")[2] for line in log.splitlines() if "validation after" in line]


def images_of(folder: Path, name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / name / "out" / "sample").glob("*.png"))]


@pytest.mark.nightly
def test_two_processes_with_a_sharded_base_equal_one(sharded_arguments: Arguments, tmp_path: Path) -> None:
    words = sharded_arguments("flux")
    more = ["--gradient_checkpointing", "--base_format", "int8", "--network_args", "dora_wd=True"]
    logs = run(
        [
            ("two", 2, [*words, *more, "--shard_base"]),
            ("one", 1, [*words, *more, "--gradient_accumulation_steps", "2"]),
        ],
        "flux",
        tmp_path,
    )
    assert "spread over 2 processes" in logs["two"]
    assert relative_difference(tmp_path, "two", "one") <= 1e-5
    assert losses(logs["two"]) == losses(logs["one"]) and len(losses(logs["two"])) == 4
    drawn = images_of(tmp_path, "two")
    assert drawn == images_of(tmp_path, "one") and len(drawn) == 2


@pytest.mark.nightly
def test_a_sharded_run_resumes_exactly_and_with_another_number_of_processes(
    sharded_arguments: Arguments, tmp_path: Path
) -> None:
    words = [*sharded_arguments("lumina"), "--save_state", "--save_every_n_steps", "3", "--network_dropout", "0.1"]
    state = str(tmp_path / "two" / "out" / "mine-step00000003-state")
    run(
        [
            ("two", 2, [*words, "--shard_base"]),
            ("again", 2, [*words, "--shard_base", "--resume", state]),
            ("whole", 2, [*words, "--resume", state]),
            ("one", 1, [*words, "--resume", state, "--gradient_accumulation_steps", "2"]),
        ],
        "lumina",
        tmp_path,
    )
    assert relative_difference(tmp_path, "again", "two") == 0.0
    assert relative_difference(tmp_path, "whole", "two") <= 1e-5
    assert relative_difference(tmp_path, "one", "two") <= 1e-5


@pytest.mark.nightly
def test_four_processes_in_groups_of_two_equal_one(sharded_arguments: Arguments, tmp_path: Path) -> None:
    words = sharded_arguments("anima")
    run(
        [
            ("four", 4, [*words, "--shard_base"]),
            ("groups", 4, [*words, "--shard_base", "--shard_group", "2"]),
            ("one", 1, [*words, "--gradient_accumulation_steps", "4"]),
        ],
        "anima",
        tmp_path,
    )
    assert relative_difference(tmp_path, "four", "one") <= 1e-5
    assert relative_difference(tmp_path, "groups", "one") <= 1e-5


@pytest.mark.nightly
def test_a_subset_that_needs_the_bare_base_model_keeps_processes_in_step(
    sharded_arguments: Arguments, tmp_path: Path
) -> None:
    words = [*sharded_arguments("flux"), "--guidance_loss", "2"]
    make_images(tmp_path / "data" / "1_other", 3, seed=93)
    config = tmp_path / "data.toml"
    subsets = "".join(
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "data" / name}"\ncaption_extension = ".txt"\n{more}'
        for name, more in (("1_thing", ""), ("1_other", "custom_attributes = {diff_output_preservation = true}\n"))
    )
    config.write_text(f"[[datasets]]\nresolution = 64\nvalidation_split = 0.3\n{subsets}")
    place = words.index("--train_data_dir")
    words[place : place + 2] = ["--dataset_config", str(config)]
    run(
        [("two", 2, [*words, "--shard_base"]), ("one", 1, [*words, "--gradient_accumulation_steps", "2"])],
        "flux",
        tmp_path,
    )
    assert relative_difference(tmp_path, "two", "one") <= 1e-5


KINDS = {
    "networks.loha": [],
    "networks.lokr": ["factor=2"],
    "networks.oft_v2": [],
    "networks.dylora": [],
    "lycoris.kohya": ["algo=lokr", "factor=2", "preset=attn-mlp"],
    "networks.lora": ["init=pissa", "conv_dim=2"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("base", BASES)
def test_every_base_model_can_be_sharded(sharded_arguments: Arguments, tmp_path: Path, base: str) -> None:
    words = sharded_arguments(base)
    run(
        [("two", 2, [*words, "--shard_base"]), ("one", 1, [*words, "--gradient_accumulation_steps", "2"])],
        base,
        tmp_path,
    )
    assert relative_difference(tmp_path, "two", "one") <= 2e-5  # measured through nine layers of float32 convolutions


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_kind_is_saved_from_a_sharded_base(
    sharded_arguments: Arguments, tmp_path: Path, kind: str
) -> None:
    words = [*sharded_arguments("sd"), "--network_module", kind]
    if KINDS[kind]:
        words += ["--network_args", *KINDS[kind]]
    run(
        [("two", 2, [*words, "--shard_base"]), ("one", 1, [*words, "--gradient_accumulation_steps", "2"])],
        "sd",
        tmp_path,
    )
    assert relative_difference(tmp_path, "two", "one") <= 1e-5


@pytest.mark.nightly
def test_files_are_merged_before_the_base_is_sharded(sharded_arguments: Arguments, tmp_path: Path) -> None:
    words = sharded_arguments("flux")
    run([("first", 1, words)], "flux", tmp_path)
    merged = [*words, "--base_weights", str(tmp_path / "first" / "out" / "mine.safetensors"), "--base_format", "fp8"]
    logs = run(
        [("two", 2, [*merged, "--shard_base"]), ("one", 1, [*merged, "--gradient_accumulation_steps", "2"])],
        "flux",
        tmp_path,
    )
    assert "merged" in logs["two"] and losses(logs["two"]) == losses(logs["one"])
    assert relative_difference(tmp_path, "two", "one") <= 1e-5


@pytest.mark.nightly
def test_an_fsdp2_configuration_of_accelerate_enables_sharding(sharded_arguments: Arguments, tmp_path: Path) -> None:
    """Launch real processes, as users do."""
    words = [*sharded_arguments("flux"), "--output_dir", str(tmp_path / "out")]
    done = launch_fsdp(words, "2").ok()
    assert "accelerate is configured for FSDP2" in done.stderr and "spread over 2 processes" in done.stderr
    done = launch_fsdp(words, "1")
    assert done.status != 0 and "FSDP 1" in done.stderr


def launch_fsdp(arguments: list[str], version: str) -> Finished:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", version,
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", str(ROOT / "flux_train_network.py"), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, timeout=300, env=environment)
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


# When one of several processes dies, the others end soon, name it and save the trained weights.

GONE = "process 1 was killed without an error message"
MOST_SECONDS = 150  # of a run with its imports on a busy machine; an unnoticed broken connection takes half an hour


def run_and_lose(arguments: list[str], folder: Path, killed_at: str, *, killed: int = 1, killer: int = 0) -> list[Rank]:
    """Run two processes, one of which is killed when the other calls a function."""
    started = time.monotonic()
    job = Job(arguments, 2, str(folder), killed=killed, killer=killer, killed_at=killed_at)
    (ranks,) = run_ranks([job], folder)
    assert time.monotonic() - started < MOST_SECONDS
    assert ranks[killed].status == -signal.SIGKILL
    return ranks


def test_a_process_that_dies_while_encoding_images_is_named(base_arguments: list[str], tmp_path: Path) -> None:
    words = [*base_arguments, "--cache_latents_to_disk"]
    main, _ = run_and_lose(words, tmp_path, "library.data.caching.latents:encode_all")
    assert main.status == 1 and GONE in main.said and "Traceback" not in main.said


@pytest.mark.nightly
def test_an_error_of_the_main_process_is_reported_by_the_other(base_arguments: list[str], tmp_path: Path) -> None:
    """The main process fails on an image; the waiting process ends with that error, not a broken connection."""
    words = [*base_arguments, "--cache_latents_to_disk", "--max_train_steps", "1"]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (first,) = run_ranks([Job(words, 2, str(tmp_path / "first"))], tmp_path)
    assert [rank.status for rank in first] == [0, 0]
    next(tmp_path.rglob("*_sd.npz")).unlink()
    shutil.copytree(words[words.index("--pretrained_model_name_or_path") + 1], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    words += ["--pretrained_model_name_or_path", str(tmp_path / "model")]
    started = time.monotonic()
    ((main, other),) = run_ranks([Job(words, 2, str(tmp_path / "second"))], tmp_path)
    assert time.monotonic() - started < MOST_SECONDS
    assert main.status == other.status == 1
    assert "1 image must be encoded" in main.said and "Traceback" not in main.said + other.said
    assert "process 0 ended with an error: UserError: 1 image must be encoded" in other.said


@pytest.mark.nightly
def test_the_death_of_the_main_process_is_noticed_by_the_others(base_arguments: list[str], tmp_path: Path) -> None:
    words = [*base_arguments, "--cache_latents_to_disk"]
    _, other = run_and_lose(words, tmp_path, "library.data.caching.latents:encode_all", killed=0, killer=1)
    assert other.status == 1
    assert "process 0 was killed without an error message" in other.said or "the main process" in other.said


@pytest.mark.nightly
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_process_that_dies_during_previews_is_named_and_the_run_is_saved(
    base_arguments: list[str], tmp_path: Path, is_shared: bool
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 200\na dog --w 64 --h 64 --s 200\n")
    words = [*base_arguments, "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    words += ["--shard_base"] if is_shared else []
    main, _ = run_and_lose(words, tmp_path, "library.training.evaluation.preview:draw_latents")
    assert main.status == 1 and GONE in main.said
    assert [path.name for path in (tmp_path / "out").glob("*-state")] == ["mine-step00000002-state"]


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found below /proc")
@pytest.mark.parametrize("name", ["accelerate", "torchrun"])
def test_a_run_restarted_by_its_launcher_equals_an_undisturbed_one(
    name: str, base_arguments: list[str], tmp_path: Path
) -> None:
    """The run is started with `--max_restarts 2`, and a process is killed in mid-run."""
    words = [*base_arguments, "--max_train_steps", "60", "--autoresume", "--network_dropout", "0.1"]
    words += ["--lr_scheduler", "cosine"]
    undisturbed = [*words, "--output_dir", str(tmp_path / "whole")]
    done = subprocess.run(restarted(undisturbed, name), capture_output=True, timeout=300, env=cpu_environment("true"))
    assert done.returncode == 0, done.stderr.decode()
    log_path = tmp_path / "said"
    with log_path.open("w") as file:
        launcher = subprocess.Popen(restarted(words, name), env=cpu_environment("true"), stdout=file, stderr=file)
        wait_for(lambda: re.search(r" [5-9]/60 ", log_path.read_text()), 200)
        os.kill(process_of_rank(launcher.pid, 1), signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0, log_path.read_text()
    assert not children_alive(launcher.pid)
    text = log_path.read_text()
    assert GONE in text and "60/60" in text
    ours, theirs = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("out", "whole"))
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


def restarted(arguments: list[str], launcher: str) -> list[str]:
    command = two_processes(arguments)
    if launcher == "torchrun":
        script = next(word for word in command if word.endswith("train_network.py"))
        options = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "2"]
        return [sys.executable, "-m", "torch.distributed.run", *options, *command[command.index(script) :]]
    place = command.index("--multi_gpu")
    return [*command[:place], "--max_restarts", "2", *command[place:]]


def children_alive(launcher: int) -> bool:
    return Path(f"/proc/{launcher}").exists() and bool(children_of(launcher))
