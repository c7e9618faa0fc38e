"""kill -9 at any moment damages no files, and the next start resumes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.training.saving.state import read_manifest
from tests.running import ROOT

MOMENTS = ("caching latents", "saving checkpoint", "saving state", "removing old", "sampl", "epoch 2", "saving state")


def start(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train_network.py"), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def kill_at(process: "subprocess.Popen[bytes]", log: Path, moment: str, delay: float) -> None:
    """Kill the process shortly after `moment` appears in its output, unless it ends before."""
    while process.poll() is None and moment not in log.read_text(encoding="utf-8", errors="replace"):
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


def assert_nothing_is_damaged(output: Path, images: Path) -> None:
    for path in output.glob("*.safetensors") if output.is_dir() else ():
        assert load_state_dict(path), path
    for path in output.glob("*-state") if output.is_dir() else ():
        assert read_manifest(path).step > 0
    for path in output.glob("sample/*.png") if output.is_dir() else ():
        from PIL import Image

        Image.open(path).load()
    for path in images.rglob("*_sd.npz"):
        with np.load(path) as archive:
            assert all(np.isfinite(archive[key]).all() for key in archive.files if key.startswith("latents"))


@pytest.mark.nightly
def test_a_repeatedly_killed_run_gives_the_same_result(base_arguments: list[str], images: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 3 --d 1\n")
    arguments = [
        *base_arguments, "--max_train_steps", "12", "--cache_latents_to_disk", "--save_every_n_steps", "1",
        "--save_last_n_steps", "2", "--save_state", "--autoresume", "--sample_every_n_steps", "2", "--sample_prompts",
        str(tmp_path / "prompts.txt"),
    ]  # fmt: skip
    delays = random.Random(20)
    for number, moment in enumerate(MOMENTS):
        log = tmp_path / f"{number}.log"
        kill_at(start(arguments, log), log, moment, delays.uniform(0, 0.4))
        assert_nothing_is_damaged(tmp_path / "out", images)
    assert start(arguments, tmp_path / "last.log").wait(timeout=300) == 0, (tmp_path / "last.log").read_text()
    alone = [*arguments, "--output_dir", str(tmp_path / "alone")]
    assert start(alone, tmp_path / "alone.log").wait(timeout=300) == 0
    actual, other = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("out", "alone"))
    assert actual.keys() == other.keys()
    assert all(torch.equal(actual[key], other[key]) for key in actual)
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith((".unfinished", ".replaced"))]
