"""Check training on this machine with your own base model and options: the denoiser against diffusers' class, the
memory settings against the plain ones, 20 steps, resuming from step 10, and memory and time against the plan.

Ends with a block of text to paste into an issue, without paths, names or captions. Adapters, states and events go to a
temporary folder.
"""

import argparse
import importlib
import importlib.util
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor, nn

from library.base.errors import about
from library.base.formatting import format_gib
from library.base.temporary_folders import delete_abandoned_folders, make_temporary_folder
from library.base.terminal import print_line
from library.checkpoints.base_model_spec import BaseModelSpec
from library.commands.command import make_training_parser, training_command
from library.commands.counted_plan import count, read_training_options
from library.environment.packages import version_of
from library.memory.devices import DTYPES
from library.memory.planner.measured import benchmark_gpu
from library.memory.planner.prediction import MemoryMode, predict
from library.models.reference import MissingClass
from library.options.base import Options
from library.options.config_file import ConfigFileOptions
from library.options.output.console import ConsoleOptions
from library.options.output.preview import PreviewOptions
from library.options.output.reports import ReportOptions
from library.options.output.saving import HubOptions, MetadataOptions, SavingOptions, StateOptions
from library.options.output.trackers import TrackerOptions
from library.options.train import TrainOptions
from library.options.training.flow import TimestepPreviewOptions
from library.options.training.validation import ValidationOptions
from library.training.command_line.cli import to_toml_value
from library.training.config_file import SECRETS, write_config
from library.training.models.preflight import mute_logging
from library.training.planning.settings import describe, resolve_memory_mode
from networks.core.protocol import OURS

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS, RESUMED_AT = 20, 10
WARM_UP = 5  # steps left out of the timing
MAX_DIFFERENCE = 1e-3  # allowed difference, relative to the largest output; float32, two blocks of each kind
# Allowed difference of a resumed run, as a multiple of the difference of two resumed runs. With noise in the last bit
# of dQ, pairs of equal runs differ by 1.1e-4 to 3.3e-4 of a tiny adapter's size; without its optimizer state a resumed
# run differs by 4.4e-2.
MAX_SPREADS = 10
MEMORY_SHARE, TIME_FACTOR = 0.1, 1.5  # allowed deviation from the plan
NAME, OPTIONS_FILE, EVENTS_FILE = "verify", "options.toml", "events.jsonl"
EXAMPLES = """\
  python3 tools/verify.py --script train_network.py --fit auto \\
    --pretrained_model_name_or_path model.safetensors --train_data_dir my_images \\
    --network_module networks.lora --network_dim 16 --mixed_precision bf16 --cache_latents"""

# Options that have no part in what is checked: files, uploads, previews and trackers, and where and how a run starts.
DROPPED = (
    ConfigFileOptions, ConsoleOptions, SavingOptions, StateOptions, MetadataOptions, HubOptions, TrackerOptions,
    ReportOptions, PreviewOptions, ValidationOptions, TimestepPreviewOptions,
)  # fmt: skip
# Options that the trial sets itself: its length and its files.
TRIAL_OPTIONS: Mapping[str, Any] = {
    **{name: default for kind in DROPPED for name, default in kind.defaults().items()},
    "debug_dataset": False,
    "audit_only": False,
    "dry_run": False,
    "max_train_steps": NUM_STEPS,
    "max_train_epochs": None,
    "output_name": NAME,
    "save_precision": "float",  # rounding could hide a difference
    "save_state": True,
    "save_every_n_steps": RESUMED_AT,
    "no_report": True,
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
    is_wrong: bool | None = False  # None: there is nothing to compare with

    def __str__(self) -> str:
        verdict = "-" if self.is_wrong is None else "WRONG" if self.is_wrong else "ok"
        return f"{verdict:<6}{self.what:<24}{self.found}"


def setup_parser() -> argparse.ArgumentParser:
    return make_training_parser(__doc__, EXAMPLES)


def verify(args: argparse.Namespace, training: Sequence[str]) -> int:
    """Run every check and print the block to paste. Return 1 if a check failed, else 0."""
    spec, options = read_training_options(args.script, training)
    results: list[Result] = []
    if options.sweep.sweep:
        raise about("--sweep")(
            "is not supported here", "remove it: each adapter of a sweep trains as a single one does"
        )
    delete_abandoned_folders((gettempdir(),))
    folder = Path(make_temporary_folder("verify"))
    try:
        for result in run_checks(spec, options, training, folder):
            print_line(str(result))
            results.append(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_line("\npaste from here " + "-" * 40)
    mode = resolve_memory_mode(options.memory, options.precision, options.distributed)
    described = list_options(spec, options.flat(), type(options).defaults(), mode)
    for line in (*describe_machine(), *described, *map(str, results)):
        print_line(line)
    print_line("to here " + "-" * 48)
    return int(any(result.is_wrong for result in results))


def run_checks(spec: BaseModelSpec, options: TrainOptions, training: Sequence[str], folder: Path) -> Iterator[Result]:
    """Yield the results; stop after the first failed training run."""
    with mute_logging():
        denoiser = spec.build(options).load.denoiser()
    yield compare_with_diffusers(denoiser, spec.build.__module__.rpartition(".")[0])
    # Each trial loads its own copy in another process; memory may not suffice for two.
    del denoiser
    uninterrupted = prepare_trial(spec, options, folder / "whole", {"selftest": True})
    print_line(f"training {NUM_STEPS} steps ...", sys.stderr)
    process = uninterrupted.train()
    yield from uninterrupted.results(process)
    if process.returncode:
        return
    yield compare_resumed(spec, options, uninterrupted, folder)
    with mute_logging():
        mode = resolve_memory_mode(options.memory, options.precision, options.distributed)
        planned = predict_step(spec, mode, options.precision.mixed_precision, training, uninterrupted)
    yield from compare_with_plan(uninterrupted.events("step"), planned, torch.cuda.is_available())


# The denoiser


def compare_with_diffusers(denoiser: nn.Module, package: str) -> Result:
    """Compare our class with that of diffusers: two blocks of each kind, CPU, float32. `package` contains the
    reference."""
    subject = "denoiser"
    if type(denoiser).__module__.startswith("diffusers."):
        return Result(subject, f"diffusers' own {type(denoiser).__name__}")
    name = f"{package}.reference"
    if importlib.util.find_spec(name) is None:
        return Result(subject, "not compared: no class of diffusers is known for this base model", None)
    reference: Any = importlib.import_module(name)
    try:
        with torch.no_grad():
            output, expected = reference.outputs(denoiser, torch.Generator().manual_seed(0))
    except MissingClass as error:
        return Result(subject, f"not compared: diffusers {version_of('diffusers')} has no {error}", None)
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
    def state(self) -> Path:
        return self.folder / f"{NAME}-step{RESUMED_AT:08d}-state"

    def train(self) -> "subprocess.CompletedProcess[str]":
        """Run the training and print its log if it fails; the log is the standard error."""
        # In the user's folder, which relative paths in the options refer to.
        command = [sys.executable, str(self.script), "--config_file", str(self.folder / OPTIONS_FILE)]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if process.returncode != 0:
            print_line(process.stderr, sys.stderr)
        return process

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.folder / EVENTS_FILE).read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["event"] == kind]

    def results(self, process: "subprocess.CompletedProcess[str]") -> Iterator[Result]:
        match = re.search(r"self-test: (\d+ gradients in \d+ blocks .*)", process.stderr)
        has_failed = "--selftest:" in process.stderr
        if match is not None or has_failed:
            text = match[1] if match is not None else "gradients differ from the plain mode, see above"
            yield Result("memory mode", text, has_failed)
        if process.returncode:
            yield Result(f"{NUM_STEPS} steps", f"failed: {find_error(process.stderr)}", is_wrong=True)
            return
        losses = [step["loss"] for step in self.events("step")]
        finite = [loss for loss in losses if loss is not None]
        first, last = (f"{loss:.4f}" for loss in (finite[0], finite[-1])) if finite else ("-", "-")
        text = f"{len(finite)} of {len(losses)} losses are finite; the first is {first}, the last {last}"
        yield Result(f"{NUM_STEPS} steps", text, len(finite) < NUM_STEPS)


def prepare_trial(spec: BaseModelSpec, options: Options, folder: Path, changes: Mapping[str, Any]) -> Trial:
    """Write the options of a short training run: those of the user's run after its recipe, file and command line,
    without passwords, overridden by `TRIAL_OPTIONS` and `changes`."""
    folder.mkdir()
    given = options.flat()
    seed = 1 if given["seed"] is None else given["seed"]
    own = {"output_dir": str(folder), "log_events": str(folder / EVENTS_FILE), "seed": seed}
    values = {**shorten_schedule(given), **TRIAL_OPTIONS, **own, **changes}
    defaults = type(options).defaults()
    written = {name: values[name] for name in defaults if name not in SECRETS and values[name] != defaults[name]}
    write_config(folder / OPTIONS_FILE, {name: to_toml_value(value) for name, value in written.items()})
    return Trial(ROOT / spec.script, folder)


def shorten_schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten phases of the learning rate that are given in steps, so that they fit into the trial."""
    phases = {name: values[name] for name in ("lr_warmup_steps", "lr_decay_steps")}
    return {**values, **{name: min(n, WARM_UP) if isinstance(n, int) else n for name, n in phases.items()}}


def find_error(log: str) -> str:
    """Return the type of the error that ended a run, without its message, which may name files."""
    kinds = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt))\b", log, re.MULTILINE)
    if "out of memory" in log.lower():
        return "out of memory, see above"
    return f"{kinds[-1]}, see above" if kinds else "see above"


def compare_resumed(spec: BaseModelSpec, options: Options, uninterrupted: Trial, folder: Path) -> Result:
    """Continue the run from its state, and compare the adapters. Where equal bytes are not promised, continue it a
    second time: the two continued runs show how much rounding alone changes."""
    is_exact = options.flat()["deterministic"] or not torch.cuda.is_available()
    adapters: list[Path] = []
    for name in ("again", "once-more"):
        resumed = prepare_trial(spec, options, folder / name, {"resume": str(uninterrupted.state)})
        print_line(f"resuming from step {RESUMED_AT} ...", sys.stderr)
        process = resumed.train()
        if process.returncode:
            return Result("resuming", f"failed: {find_error(process.stderr)}", is_wrong=True)
        adapters.append(resumed.adapter)
        if is_exact or not compare_files(uninterrupted.adapter, resumed.adapter).is_wrong:
            break
    return compare_files(uninterrupted.adapter, *adapters)


def compare_files(uninterrupted: Path, resumed: Path, resumed_again: Path | None = None) -> Result:
    """Compare the adapters of the uninterrupted and the resumed run: byte for byte, or by the spread of two resumed
    runs."""
    from safetensors.torch import load_file

    expected, tensors = load_file(uninterrupted), load_file(resumed)
    subject = f"resumed from step {RESUMED_AT}"
    if expected.keys() != tensors.keys():
        return Result(subject, "the files contain different tensors", is_wrong=True)
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])]
    if not different:
        return Result(subject, f"identical ({len(expected)} tensors)")
    found, difference = f"{len(different)} of {len(expected)} tensors differ", relative_difference(expected, tensors)
    if resumed_again is None:
        found = f"{found}, by {difference:.1e} of their size"
        return Result(subject, f"{found}; they must be identical on a CPU and with --deterministic", is_wrong=True)
    again = load_file(resumed_again)
    # A lost state shows in both, rounding is the smaller of the two as often as the larger.
    difference = min(difference, relative_difference(expected, again))
    spread = relative_difference(tensors, again)
    is_wrong = difference > MAX_SPREADS * spread
    reason = "more than rounding explains" if is_wrong else "rounding of GPU kernels that add in any order"
    found = f"{found}, by {difference:.1e} of their size, two resumed runs by {spread:.1e}"
    return Result(subject, f"{found}: {reason}", is_wrong)


def relative_difference(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of two adapters relative to the norm of the first."""
    differences = [(tensors[name].double() - tensor.double()).norm() for name, tensor in expected.items()]
    norms = [tensor.double().norm() for tensor in expected.values()]
    return float(torch.stack(differences).norm() / torch.stack(norms).norm())


# The plan


@dataclass(frozen=True)
class PlannedStep:
    """The prediction that a step is compared with."""

    tensor_bytes: int
    seconds: float  # of all batches of a step


def predict_step(
    spec: BaseModelSpec, mode: MemoryMode, mixed_precision: str, training: Sequence[str], trial: Trial
) -> PlannedStep:
    """Predict a step with the run's settings; --fit has done so in the trial."""
    (plan,) = trial.events("plan")
    if (chosen := plan["planned"]) is not None:
        return PlannedStep(chosen["tensor_bytes"], chosen["seconds"] * plan["accumulation"])
    _, counted = count(spec.script, training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predicted = predict(counted.step, mode, benchmark_gpu(device, 0, DTYPES[mixed_precision]))
    return PlannedStep(predicted.tensor_bytes, predicted.seconds * plan["accumulation"])


def compare_with_plan(steps: Sequence[Mapping[str, Any]], planned: PlannedStep, has_gpu: bool) -> Iterator[Result]:
    """Yield the measured time and memory of a step next to the predicted ones, which are those of a GPU."""
    times = [step["timing"]["seconds"] for step in steps[WARM_UP:] if step["timing"] is not None]
    memories = [step["memory"] for step in steps if step["memory"] and step["memory"]["card_peak"]]
    peaks, reserved = ([memory[key] for memory in memories] for key in ("card_peak", "card_reserved_peak"))
    if times:
        median = statistics.median(times)
        is_wrong = not planned.seconds / TIME_FACTOR <= median <= planned.seconds * TIME_FACTOR
        found = f"{median:.2f} s (median of {len(times)}), {planned.seconds:.2f} s planned"
        yield Result("time of a step", found, is_wrong if has_gpu else None)
    if peaks:
        is_wrong = abs(max(peaks) - planned.tensor_bytes) > MEMORY_SHARE * planned.tensor_bytes
        found = (
            f"{format_gib(max(peaks))} in tensors at the peak, {format_gib(planned.tensor_bytes)} planned; torch took "
            f"{format_gib(max(reserved))} from the GPU"
        )
        yield Result("memory of a step", found, is_wrong)
    else:
        found = f"not measured without a GPU: {format_gib(planned.tensor_bytes)} in tensors planned"
        yield Result("memory of a step", found, None)


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
