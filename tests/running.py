"""Whole runs of the training scripts on tiny models.

`train` runs the script in this process, which is fast; `launch` runs it as users do, through `accelerate launch`.
"""

import importlib
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.architectures.scripts import OtherScripts
from library.architectures.specs import list_specs
from library.checkpoints.base_model_spec import BaseModelSpec
from library.options.leco import LecoOptions, leco_options
from library.options.model import BASE_FLAG
from library.training.failures.interruption import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
SCRIPTS: Mapping[str, BaseModelSpec] = {spec.script.removesuffix(".py"): spec for spec in list_specs()}
SDXL = SCRIPTS["sdxl_train_network"]
STARTED: Mapping[str, BaseModelSpec] = {  # including those that train on prompts alone
    **SCRIPTS,
    "train_leco": replace(SCRIPTS["train_network"], options=LecoOptions),
    "sdxl_train_leco": replace(
        SCRIPTS["sdxl_train_network"], options=leco_options(SCRIPTS["sdxl_train_network"].options)
    ),
}


@dataclass(frozen=True)
class Finished:
    """The result of a run: exit status and output."""

    status: int
    stdout: str
    stderr: str

    def ok(self) -> "Finished":
        """Return this result; raise AssertionError with the log unless the run succeeded."""
        assert self.status == 0, self.stderr
        return self

    @property
    def losses(self) -> list[float]:
        """The average loss after every step, with three digits, as the progress bar shows it.

        How often the bar is drawn depends on time, but the last value of each step does not.
        """
        shown = re.findall(r"steps:[^\r\n]*?(\d+)/\d+ \[[^\]\r\n]*avr_loss=([\d.e+-]+)", self.stderr)
        return list({int(step): float(loss) for step, loss in shown}.values())


def load_saved(folder: Path, name: str = "mine") -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file that a run wrote into `out` of a folder."""
    return load_file(folder / "out" / f"{name}.safetensors")


def make_images(folder: Path, count: int, side: int = 64, seed: int = 0) -> Path:
    """Write smooth random images with captions of random words."""
    folder.mkdir(parents=True)
    rng, words = np.random.default_rng(seed), random.Random(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
        tags = words.sample(["red", "blue", "cat", "dog", "sitting", "running", "grass"], 4)
        (folder / f"{i:02}.txt").write_text(", ".join(tags))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A --train_data_dir with six images, each repeated twice."""
    make_images(tmp_path / "data" / "2_thing", 6)
    return tmp_path / "data"


@pytest.fixture
def base_arguments(tiny_sd_folder: Path, images: Path, tmp_path: Path) -> list[str]:
    """A command line that trains the tiny model for four steps."""
    return [
        "--pretrained_model_name_or_path", str(tiny_sd_folder), "--train_data_dir", str(images),
        "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--network_module", "networks.lora", "--network_dim", "4",
        "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--no_report",
    ]  # fmt: skip


def small_run(images: Path, folder: Path, module: str, num_steps: str) -> list[str]:
    """Return a command line for a short run into `out` of a folder, without the base model."""
    return [
        "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64", "--train_batch_size", "2",
        "--output_dir", str(folder / "out"), "--output_name", "mine", "--network_module", module, "--network_dim", "4",
        "--learning_rate", "1e-3", "--max_train_steps", num_steps, "--seed", "5", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip


def tiny_model(name: str, seed: int, **settings: Any) -> Any:
    """Return a fixture with what `build_tiny_…` of tests/tiny returns: the options that select a tiny model, or its
    path, a diffusers folder unless its layout is a single .safetensors file with tokenizer/ next to it. The files are
    read-only."""

    @pytest.fixture(scope="session")
    def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
        build = getattr(importlib.import_module(f"tests.tiny.{name}"), f"build_tiny_{name}")
        return build(tmp_path_factory.mktemp(name), seed, **settings)

    return model


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Reset what a run leaves in the process: accelerate's state and signal handlers."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def train(fresh_process: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Run a script in this process: `train([...])`, `train([...], script="train_network")`."""

    def run(arguments: list[str], script: str = "train_network") -> Finished:
        from accelerate.state import AcceleratorState, PartialState

        from library.training.command_line.main import main

        AcceleratorState._reset_state()
        PartialState._reset_state()
        capfd.readouterr()
        if script == "train_leco":
            status = exit_status(lambda: train_by_prompts(arguments))
            return Finished(status, *capfd.readouterr())
        spec, parser = STARTED[script], importlib.import_module(script).setup_parser()
        status = exit_status(
            lambda: main(parser, spec.options, spec.build, arguments, latents=spec.latents, objective=spec.objective)
        )
        return Finished(status, *capfd.readouterr())

    return run


def train_by_prompts(arguments: list[str]) -> int:
    """Run train_leco.py, which recognises the base model itself."""
    from library.architectures.specs import recognise_base_model
    from library.training.command_line.prompt_training import main_by_prompts

    return main_by_prompts(partial(recognise_base_model, BASE_FLAG), OtherScripts("train_leco.py"), arguments)


def exit_status(run: Callable[[], int]) -> int:
    """Return the exit status of a script, including that of argparse."""
    try:
        return run()
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def launch() -> Callable[..., Finished]:
    """Run a script as users do: `accelerate launch train_network.py …` in a separate process."""

    def run(arguments: list[str], script: str = "train_network.py", timeout: float = 300) -> Finished:
        done = subprocess.run([*launch_command(script), *arguments], capture_output=True, timeout=timeout, cwd="/")
        return Finished(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))

    return run


def launch_command(script: str) -> list[str]:
    """Return the start of a command line that works without an accelerate configuration, from any folder."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    return [*launcher, "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", str(ROOT / script)]
