"""Check training on this machine with your own base model and options: the denoiser against diffusers' class, the
memory settings against the plain ones, 20 steps, resuming from step 10, and time and memory against the plan.

Ends with a block of text to paste into an issue, without paths, names or captions. Adapters, states and events go to a
temporary folder.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import nn

from library.checkpoints.base_model_spec import BaseModelSpec
from library.errors import UserError
from library.installed import version_of
from library.memory.devices import DTYPES
from library.memory.planner.gpus import benchmark_gpu
from library.memory.planner.prediction import MemoryMode, Predicted, predict
from library.memory.planner.table import format_gib
from library.models.reference import MissingClass
from library.options.train import TrainOptions
from library.training.models.check_batches import mute_logging
from library.training.planning.settings import describe, resolve_memory_mode
from networks.core.protocol import OURS
from tools.command import make_training_parser, training_command
from tools.plan_memory import count, read_training_options

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS, RESUMED_AT = 20, 10
WARM_UP = 5  # steps left out of the timing
MAX_DIFFERENCE = 1e-3  # allowed difference, relative to the largest output; float32, two blocks of each kind
NAME = "verify"
EXAMPLES = """\
  python3 tools/verify.py --script train_network.py --fit auto \\
    --pretrained_model_name_or_path model.safetensors --train_data_dir my_images \\
    --network_module networks.lora --network_dim 16 --mixed_precision bf16 --cache_latents"""

# Options that the trial sets itself: its length, its files, and no uploads, previews or trackers.
TRIAL_OPTIONS: Mapping[str, Any] = {
    "max_train_steps": NUM_STEPS,
    "max_train_epochs": None,
    "output_name": NAME,
    "save_model_as": "safetensors",
    "save_state": True,
    "save_every_n_steps": RESUMED_AT,
    "save_every_n_epochs": None,
    "save_n_epoch_ratio": None,
    "save_last_n_steps": None,
    "save_last_n_steps_state": None,
    "save_last_n_epochs": None,
    "save_last_n_epochs_state": None,
    "sample_every_n_steps": None,
    "sample_every_n_epochs": None,
    "sample_at_first": False,
    "log_with": None,
    "logging_dir": None,
    "huggingface_repo_id": None,
    "autoresume": False,
    "no_report": True,
    "quiet": False,  # the result of the self-test is in the log
}
# Options that describe how a training runs and contain no names or paths.
SHOWN = (
    "network_module", "network_dim", "network_alpha", "optimizer_type", "mixed_precision", "full_bf16", "full_fp16",
    "train_batch_size", "resolution", "gradient_accumulation_steps", "base_format", "base_arithmetic", "fit",
    "gradient_checkpointing", "gradient_checkpointing_every", "cpu_offload_checkpointing", "blocks_to_swap", "compile",
    "network_train_unet_only", "network_train_text_encoder_only", "cache_latents", "cache_text_encoder_outputs",
    "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The result of one check: its subject, what was found, and whether that is wrong."""

    what: str
    found: str
    is_wrong: bool = False

    def __str__(self) -> str:
        return f"{'WRONG' if self.is_wrong else 'ok':<6}{self.what:<24}{self.found}"


def setup_parser() -> argparse.ArgumentParser:
    return make_training_parser(__doc__, EXAMPLES)


def verify(args: argparse.Namespace, training: Sequence[str]) -> int:
    """Run every check and print the block to paste. Return 1 if a check failed, else 0."""
    spec, options = read_training_options(args.script, training)
    results: list[Result] = []
    if options.sweep.sweep:
        raise UserError("--sweep is not supported here; remove it: each adapter of a sweep trains as a single one does")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        for result in run_checks(spec, options, training, Path(folder)):
            print(result, flush=True)
            results.append(result)
    print("\npaste from here " + "-" * 40)
    mode = resolve_memory_mode(options.memory, options.precision, options.distributed)
    described = list_options(spec, options.flat(), type(options).defaults(), mode)
    for line in (*describe_machine(), *described, *map(str, results)):
        print(line)
    print("to here " + "-" * 48)
    return int(any(result.is_wrong for result in results))


def run_checks(spec: BaseModelSpec, options: TrainOptions, training: Sequence[str], folder: Path) -> Iterator[Result]:
    """Yield the results; stop after the first failed training run."""
    with mute_logging():
        denoiser = spec.build(options).load.denoiser()
    yield compare_with_diffusers(denoiser, spec.build.__module__.rpartition(".")[0])
    # Each trial loads its own copy in another process; memory may not suffice for two.
    del denoiser
    uninterrupted = prepare_trial(spec, options, folder / "whole", {"selftest": True})
    print(f"training {NUM_STEPS} steps ...", file=sys.stderr, flush=True)
    process = uninterrupted.train()
    yield from uninterrupted.results(process)
    if process.returncode:
        return
    state = folder / "whole" / f"{NAME}-step{RESUMED_AT:08d}-state"
    resumed = prepare_trial(spec, options, folder / "again", {"resume": str(state)})
    print(f"resuming from step {RESUMED_AT} ...", file=sys.stderr, flush=True)
    process = resumed.train()
    if process.returncode:
        yield Result("resuming", f"failed: {find_error(process.stderr)}", is_wrong=True)
        return
    yield compare_files(uninterrupted.adapter, resumed.adapter)
    with mute_logging():
        planned = predict_step(spec, options, training)
    yield from compare_with_plan(uninterrupted.steps(), planned)


# The denoiser


def compare_with_diffusers(denoiser: nn.Module, package: str) -> Result:
    """Compare our class with that of diffusers: two blocks of each kind, CPU, float32. `package` contains the
    reference."""
    subject = "denoiser"
    if type(denoiser).__module__.startswith("diffusers."):
        return Result(subject, f"diffusers' own {type(denoiser).__name__}")
    name = f"{package}.reference"
    if importlib.util.find_spec(name) is None:
        return Result(subject, "not compared: no class of diffusers is known for this base model")
    reference: Any = importlib.import_module(name)
    try:
        with torch.no_grad():
            output, expected = reference.outputs(denoiser, torch.Generator().manual_seed(0))
    except MissingClass as error:
        return Result(subject, f"not compared: diffusers {version_of('diffusers')} has no {error}")
    distance = float((output - expected).abs().max() / expected.abs().max())
    is_wrong = not distance <= MAX_DIFFERENCE  # NaN is wrong too
    return Result(
        subject, f"first and last blocks differ from diffusers' class by {distance:.1e} of the largest value", is_wrong
    )


# Training


@dataclass(frozen=True)
class Trial:
    """A short training run in a separate process."""

    script: Path
    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / f"{NAME}.safetensors"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    def train(self) -> "subprocess.CompletedProcess[str]":
        """Run the training and print its log if it fails; the log is the standard error."""
        command = [sys.executable, str(self.script), "--config_file", str(self.folder / "options.toml")]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        if process.returncode != 0:
            print(process.stderr, file=sys.stderr)
        return process

    def steps(self) -> list[dict[str, Any]]:
        """Return the step events."""
        lines = map(json.loads, self.events.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["event"] == "step"]

    def results(self, process: "subprocess.CompletedProcess[str]") -> Iterator[Result]:
        match = re.search(r"self-test: (\d+ gradients in \d+ blocks .*)", process.stderr)
        has_failed = "--selftest:" in process.stderr
        if match is not None or has_failed:
            text = match[1] if match is not None else "gradients differ from the plain mode, see above"
            yield Result("memory mode", text, has_failed)
        if process.returncode:
            yield Result(f"{NUM_STEPS} steps", f"failed: {find_error(process.stderr)}", is_wrong=True)
            return
        losses = [step["loss"] for step in self.steps()]
        finite = [loss for loss in losses if loss is not None]
        first, last = (f"{loss:.4f}" for loss in (finite[0], finite[-1])) if finite else ("-", "-")
        text = f"{len(finite)} of {len(losses)} losses are finite; the first is {first}, the last {last}"
        yield Result(f"{NUM_STEPS} steps", text, len(finite) < NUM_STEPS)


def prepare_trial(spec: BaseModelSpec, options: TrainOptions, folder: Path, changes: Mapping[str, Any]) -> Trial:
    """Write the options of a short training run: the user's, overridden by `TRIAL_OPTIONS` and `changes`."""
    import toml

    folder.mkdir()
    trial_files = {"output_dir": str(folder), "log_events": str(folder / "events.jsonl"), "seed": options.run.seed or 1}
    values = {**options.flat(), **TRIAL_OPTIONS, **trial_files, **changes}
    defaults = type(options).defaults()
    changed = {
        name: [str(item) for item in value] if isinstance(value, list | tuple) else convert_to_toml(value)
        for name, value in values.items()
        if name in defaults and value is not None and value != defaults[name]
    }
    (folder / "options.toml").write_text(toml.dumps(changed), encoding="utf-8")
    return Trial(ROOT / spec.script, folder)


def convert_to_toml(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else str(value)


def find_error(log: str) -> str:
    """Return the type of the error that ended a run, without its message, which may name files."""
    kinds = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))\b", log, re.MULTILINE)
    if "out of memory" in log.lower():
        return "out of memory, see above"
    return f"{kinds[-1]}, see above" if kinds else "see above"


def compare_files(uninterrupted: Path, resumed: Path) -> Result:
    """Compare the tensors of two adapter files byte for byte."""
    from safetensors.torch import load_file

    expected, tensors = load_file(uninterrupted), load_file(resumed)
    subject = f"resumed from step {RESUMED_AT}"
    if expected.keys() != tensors.keys():
        return Result(subject, "the files contain different tensors", is_wrong=True)
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])]
    if not different:
        return Result(subject, f"identical ({len(expected)} tensors)")
    largest = max(float(tensor.float().abs().max()) for tensor in expected.values())
    largest_difference = max(float((expected[name].float() - tensors[name].float()).abs().max()) for name in different)
    hint = "usual with GPU kernels that sum in any order; with --deterministic it is a bug"
    return Result(
        subject,
        f"{len(different)} of {len(expected)} tensors differ by up to {largest_difference / largest:.1e} ({hint})",
        True,
    )


# The plan


def predict_step(spec: BaseModelSpec, options: TrainOptions, training: Sequence[str]) -> Predicted | None:
    """Predict a step with the run's settings; None with --fit, which chooses and checks by itself."""
    if options.fit.fit is not None:
        return None
    *_, counted = count(spec.script, training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mode = resolve_memory_mode(options.memory, options.precision, options.distributed)
    return predict(counted.step, mode, benchmark_gpu(device, 0, DTYPES[options.precision.mixed_precision]))


def compare_with_plan(steps: Sequence[Mapping[str, Any]], planned: Predicted | None) -> Iterator[Result]:
    """Yield the measured time and memory of a step next to the predicted ones."""
    times = [step["timing"]["seconds"] for step in steps[WARM_UP:] if step["timing"] is not None]
    peaks = [step["memory"]["card_peak"] for step in steps if step["memory"] and step["memory"]["card_peak"]]
    plan = "chosen by --fit" if planned is None else f"{planned.seconds:.2f} s per batch planned"
    if times:
        yield Result("time of a step", f"{statistics.median(times):.2f} s (median of {len(times)}), {plan}")
    if peaks:
        plan = "" if planned is None else f", {format_gib(planned.tensor_bytes)} planned"
        yield Result("memory of a step", f"{format_gib(max(peaks))} in tensors at the peak{plan}")
    else:
        plan = "" if planned is None else f": {format_gib(planned.tensor_bytes)} in tensors planned"
        yield Result("memory of a step", f"not measured without a GPU{plan}")


# Description of the machine and the options


def describe_machine() -> Iterator[str]:
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {packages}"
    if not torch.cuda.is_available():
        yield "no GPU: everything ran on the CPU"
        return
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    yield f"{name}, sm_{major}{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"


def list_options(
    spec: BaseModelSpec, values: dict[str, Any], defaults: Mapping[str, Any], mode: MemoryMode
) -> Iterator[str]:
    if not str(values["network_module"]).startswith(OURS):
        # The path of somebody's own module can name its author.
        values["network_module"] = "of others"
    changed = [(name, values[name]) for name in SHOWN if name in values and values[name] != defaults[name]]
    options = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed)
    yield f"{spec.script} {options}; {describe(mode)}"


main = training_command(setup_parser, verify)

if __name__ == "__main__":
    sys.exit(main())
