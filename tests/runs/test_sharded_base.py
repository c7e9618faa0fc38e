"""--shard_base: runs whose processes each keep a shard of the base model, compared with single-process runs."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from library.checkpoints.files import load_state_dict
from tests.ranks import Job, run_ranks
from tests.running import ROOT, Finished, make_images
from tests.tiny.bases import BASES

Arguments = Callable[[str], list[str]]
CHANGES = ["--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9", "--learning_rate", "0.3"]
"""An optimizer that does not divide by the size of the gradient, which would blow the rounding of small ones up."""


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
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
def test_two_processes_with_a_sharded_base_equal_one(arguments: Arguments, tmp_path: Path) -> None:
    words = arguments("flux")
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
    arguments: Arguments, tmp_path: Path
) -> None:
    words = [*arguments("lumina"), "--save_state", "--save_every_n_steps", "3", "--network_dropout", "0.1"]
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
def test_four_processes_in_groups_of_two_equal_one(arguments: Arguments, tmp_path: Path) -> None:
    words = arguments("anima")
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
def test_a_subset_that_needs_the_bare_base_model_keeps_processes_in_step(arguments: Arguments, tmp_path: Path) -> None:
    words = [*arguments("flux"), "--guidance_loss", "2"]
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
def test_every_base_model_can_be_sharded(arguments: Arguments, tmp_path: Path, base: str) -> None:
    words = arguments(base)
    run(
        [("two", 2, [*words, "--shard_base"]), ("one", 1, [*words, "--gradient_accumulation_steps", "2"])],
        base,
        tmp_path,
    )
    assert relative_difference(tmp_path, "two", "one") <= 2e-5  # measured through nine layers of float32 convolutions


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_kind_is_saved_from_a_sharded_base(arguments: Arguments, tmp_path: Path, kind: str) -> None:
    words = [*arguments("sd"), "--network_module", kind]
    if KINDS[kind]:
        words += ["--network_args", *KINDS[kind]]
    run(
        [("two", 2, [*words, "--shard_base"]), ("one", 1, [*words, "--gradient_accumulation_steps", "2"])],
        "sd",
        tmp_path,
    )
    assert relative_difference(tmp_path, "two", "one") <= 1e-5


@pytest.mark.nightly
def test_files_are_merged_before_the_base_is_sharded(arguments: Arguments, tmp_path: Path) -> None:
    words = arguments("flux")
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
def test_an_fsdp2_configuration_of_accelerate_enables_sharding(arguments: Arguments, tmp_path: Path) -> None:
    """Launch real processes, as users do."""
    words = [*arguments("flux"), "--output_dir", str(tmp_path / "out")]
    done = launch_fsdp(words, "2")
    assert done.status == 0, done.stderr
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
