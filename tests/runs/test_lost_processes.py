"""When one of several processes dies, the others end soon, name it and save the trained weights."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.checkpoints.files import load_state_dict
from tests.ranks import Job, Rank, run_ranks
from tests.runs.test_processes import children_of, cpu_environment, process_of_rank, two_processes, wait_for

GONE = "process 1 was killed without an error message"
MOST_SECONDS = 150  # of a run with its imports on a busy machine; an unnoticed broken connection takes half an hour


def run(arguments: list[str], folder: Path, killed_at: str, *, killed: int = 1, killer: int = 0) -> list[Rank]:
    """Run two processes, one of which is killed when the other calls a function."""
    started = time.monotonic()
    job = Job(arguments, 2, str(folder), killed=killed, killer=killer, killed_at=killed_at)
    (ranks,) = run_ranks([job], folder)
    assert time.monotonic() - started < MOST_SECONDS
    assert ranks[killed].status == -signal.SIGKILL
    return ranks


def test_a_process_that_dies_while_encoding_images_is_named(base_arguments: list[str], tmp_path: Path) -> None:
    words = [*base_arguments, "--cache_latents_to_disk"]
    main, _ = run(words, tmp_path, "library.data.caching.latents:encode_all")
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
    _, other = run(words, tmp_path, "library.data.caching.latents:encode_all", killed=0, killer=1)
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
    main, _ = run(words, tmp_path, "library.training.evaluation.preview:draw_latents")
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
