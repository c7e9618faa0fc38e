"""Output, exit status and TensorBoard logs of a run, as front ends read them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.base.version import NAME, VERSION
from library.training.reporting.step_times import IN_STEP
from library.training.saving.state import read_manifest
from tests.running import ROOT, Finished, launch_command

pytestmark = pytest.mark.slow

HEADER = """running training / 学習開始
  num train images * repeats / 学習画像の数×繰り返し回数: 12
  num validation images * repeats / 学習画像の数×繰り返し回数: 0
  num reg images / 正則化画像の数: 0
  num batches per epoch / 1epochのバッチ数: 6
  num epochs / epoch数: 2
  batch size per device / バッチサイズ: 2
  gradient accumulation steps / 勾配を合計するステップ数 = 2
  total optimization steps / 学習ステップ数: 6
"""


@pytest.fixture
def six_steps(base_arguments: list[str]) -> list[str]:
    """Return arguments for two epochs of six batches with two batches per step."""
    return [*base_arguments, "--max_train_epochs", "2", "--gradient_accumulation_steps", "2", "--cache_latents"]


def test_a_launched_run_prints_what_front_ends_parse(
    launch: Callable[..., Finished], six_steps: list[str], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    done = launch([*six_steps, "--logging_dir", str(logs), "--log_prefix", "run-", "--save_every_n_steps", "2"]).ok()
    assert HEADER in done.stdout
    first = next(line for line in done.stderr.splitlines() if re.match(r"\d{4}-", line))  # the launcher's are not dated
    assert first.endswith(f"INFO     {NAME} {VERSION}")
    assert re.findall(r"^epoch\s+(\d+)/(\d+)", done.stdout, re.MULTILINE) == [("1", "2"), ("2", "2")]
    assert "import network module: networks.lora" in done.stdout
    saved = re.findall(r"^saving checkpoint: (.*)$", done.stdout, re.MULTILINE)
    names = ["mine-step00000002.safetensors", "mine-step00000004.safetensors", "mine-step00000006.safetensors"]
    assert [Path(path).name for path in saved] == [*names, "mine.safetensors"]
    assert "model saved." in done.stdout
    bars = re.findall(r"steps:\s*(\d+)%\|.*?\|\s*(\d+)/(\d+)\s*\[.*?avr_loss[=:]\s*([\d.]+)", done.stderr)
    assert bars[-1][:3] == ("100", "6", "6") and float(bars[-1][3]) > 0
    assert re.search(r"\|\s*(\d+)/(\d+)\s*\[.*?(\d+\.?\d*)\s*(it/s|s/it)", done.stderr)
    assert "caching latents" in done.stderr
    log = [line[29:] for line in done.stderr.splitlines() if re.match(r"\d{4}-", line)]
    assert len(set(log)) == len(log), "no line twice"
    wanted = (
        r"trained networks\.lora of rank 4 on sd: 6 steps in \d+ s\nthe adapter is \S*mine\.safetensors\n"
        r"it changes the adapted weights by [\d.]+%: [^:]+"
    )
    assert re.fullmatch(wanted, "\n".join(log[-3:])), log
    assert re.search(r"to draw with it:\n  python3 tools/draw\.py .*mine\.safetensors.*\n\Z", done.stdout)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = logs.iterdir()
    assert re.fullmatch(r"run-\d{14}", folder.name)
    events = EventAccumulator(str(folder / "network_train")).Reload()
    tags = {"loss/current", "loss/average", "loss/epoch_average", "lr/textencoder", "lr/unet", "lr/group1"}
    speeds = {"seconds_per_step", "images_per_second", "tflops_per_second"}
    shares = {f"share_{stage.replace(' ', '_')}" for stage in IN_STEP}
    assert set(events.Tags()["scalars"]) == tags | {f"speed/{name}" for name in speeds | shares}
    assert "a step took" in done.stderr and "pictures/s" in done.stderr
    assert [event.step for event in events.Scalars("loss/epoch_average")] == [1, 2]
    assert len(events.Scalars("loss/current")) == 12


def test_progress_with_both_streams_in_one_pipe_is_complete_utf8(six_steps: list[str]) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(ROOT / "train_network.py"), *six_steps]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd="/")
    text = done.stdout.decode("utf-8")
    assert done.returncode == 0, text
    assert HEADER in text and "6/6" in text


@pytest.mark.nightly
def test_a_console_without_japanese_characters_does_not_crash_the_run(six_steps: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(ROOT / "train_network.py"), *six_steps, "--max_train_steps", "1"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    assert b"running training / ????" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_after_a_signal_the_run_finishes_its_step_saves_and_exits_with_0(
    base_arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    events = tmp_path / "events.jsonl"
    arguments = [*base_arguments, "--max_train_steps", "100000", "--console_log_simple", "--log_events", str(events)]
    command = [sys.executable, str(ROOT / "train_network.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None and process.stdout is not None
    seen = b""
    while not re.search(rb" [3-9]/100000", seen):
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    text = out.decode()
    assert process.returncode == 0, text
    state, path = sorted((tmp_path / "out").iterdir())
    assert re.fullmatch(r"mine-step\d{8}\.safetensors", path.name)
    assert state == path.with_name(f"{path.stem}-state") and read_manifest(state).step == int(path.stem[-8:])
    assert f"--resume {state} or --autoresume" in text
    end = json.loads(events.read_text().splitlines()[-1])
    assert (end["event"], end["reason"], end["step"]) == ("end", "stopped", int(path.stem[-8:]))
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.nightly
def test_a_run_ends_when_its_launcher_is_gone(base_arguments: list[str], tmp_path: Path) -> None:
    """A front end that kills only the launcher leaves no orphaned process."""
    arguments = [*base_arguments, "--max_train_steps", "100000"]
    process = subprocess.Popen([*launch_command("train_network.py"), *arguments], stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while not re.search(rb" [3-9]/100000", seen):
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    process.kill()
    while os.read(process.stderr.fileno(), 4096):  # the pipe closes when the last process of the run exits
        pass
    process.wait()
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == ["", ".safetensors"]


@pytest.mark.nightly
def test_a_full_disk_does_not_damage_earlier_files(base_arguments: list[str], tmp_path: Path) -> None:
    """A file size limit simulates the full disk: the second save fails, the first file stays intact."""
    command = [sys.executable, str(ROOT / "train_network.py"), *base_arguments]
    subprocess.run([*command, "--network_dim", "1"], check=True, capture_output=True)
    path = tmp_path / "out" / "mine.safetensors"
    before = path.read_bytes()
    limited = f'ulimit -f {len(before) // 1024 + 8}; exec "$@"'
    done = subprocess.run(["bash", "-c", limited, "bash", *command, "--network_dim", "64"], capture_output=True)
    assert done.returncode == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["mine.safetensors"]


def test_invalid_options_exit_with_2_and_a_missing_config_file_with_1() -> None:
    command = [sys.executable, str(ROOT / "train_network.py")]
    unknown = subprocess.run([*command, "--no_such_option"], capture_output=True, text=True)
    assert unknown.returncode == 2 and "unrecognized arguments" in unknown.stderr
    choice = subprocess.run([*command, "--loss_type", "l3"], capture_output=True, text=True)
    assert choice.returncode == 2 and "invalid choice" in choice.stderr
    started = time.monotonic()
    config = subprocess.run([*command, "--config_file", "nowhere"], capture_output=True, text=True)
    assert config.returncode == 1 and "nowhere.toml" in config.stderr
    assert time.monotonic() - started < 30
