"""Measure the trainer's own milliseconds per step: a step without models, gradients and optimizer.

The script's own loop trains a LoRA with the layers of Stable Diffusion 1.5, each a few channels wide. The denoiser is
replaced by one operation that gives every factor a gradient. A bare loop runs the same operation, clipping and
optimizer; the difference is the trainer's overhead. The figures are medians of the thread's CPU time, so other load on
the machine matters little.

    python -m benchmarks own_overhead
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runner import measurement
from library.base.command_parser import make_parser
from tests.running import make_images

LEVELS = (32, 64, 64, 64)
WARM_UP = 20  # steps that fill caches and optimizer states
CASES = {
    "plain": (),
    "charts": ("--logging_dir", "logs"),
    "events": ("--log_events", "events.jsonl"),
    "four batches a step": ("--gradient_accumulation_steps", "4"),
    "AdamW8bit": ("--optimizer_type", "AdamW8bit"),
}


class Touch(torch.autograd.Function):
    """A stub denoiser: returns its first input, and gives every other input a constant gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, *(torch.full_like(weight, 1e-3) for weight in ctx.weights)


class Enough(Exception):
    """Raised after the last step, to end the loop."""


class Watch:
    """A stand-in for the interruption check, which the loop makes once per step: records the time."""

    def __init__(self, num_steps: int) -> None:
        self.marks: list[float] = []
        self.num_steps = num_steps

    @property
    def is_requested(self) -> bool:
        self.marks.append(time.thread_time())
        if len(self.marks) > self.num_steps:
            raise Enough
        return False


def median_ms(marks: Sequence[float]) -> float:
    """Return the median time between marks in milliseconds, without the warm-up steps."""
    seconds = [after - before for before, after in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)]
    return 1e3 * statistics.median(seconds)


def build_model(folder: Path) -> None:
    """Write a tiny Stable Diffusion 1.x whose U-Net has as many layers as that of SD 1.5."""
    from diffusers import UNet2DConditionModel

    from tests.tiny.sd import build_tiny_sd

    build_tiny_sd(folder, seed=7)
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(8)
    unet = UNet2DConditionModel(block_out_channels=LEVELS, cross_attention_dim=width, attention_head_dim=8)
    unet.save_pretrained(folder / "unet")


def prepare_words(words: Sequence[str]) -> Any:
    """Prepare train_network.py with these options, as far as the loop."""
    import train_network
    from library.architectures.sd.assembly import build
    from library.options.train import TrainOptions
    from library.processes.process_group import from_accelerator
    from library.training.command_line.cli import parse
    from library.training.models import opening
    from library.training.models.requests import RequestedRun
    from library.training.reporting.event_stream import Events, open_event_file
    from library.training.run.prepare import prepare
    from library.training.saving.names import Names

    options = TrainOptions.from_args(parse(train_network.setup_parser(), words))
    arch = build(options)
    accelerator = opening.open_accelerator(options.precision.mixed_precision, options.trackers)
    processes = from_accelerator(accelerator)
    requested = RequestedRun.resolve(options, arch)
    plan = opening.open_data_plan(options, arch, requested.text, 1, processes.count)
    path = options.reports.log_events
    events = Events([] if path is None else [open_event_file(Path(path), False)])
    requested = replace(requested, seed=1, names=Names.build(options.saving), events=events)
    return prepare(requested, plan, accelerator, processes)


def our_ms(folder: Path, num_steps: int, more: Sequence[str]) -> tuple[float, list[nn.Parameter]]:
    """Return the milliseconds of a step of the real loop, and the parameters that it trains."""
    from library.training.loop import loop

    words = [
        "--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir", str(folder / "pictures"),
        "--caption_extension", ".txt", "--resolution", "64", "--output_dir", str(folder / "out"), "--network_module",
        "networks.lora", "--network_dim", "4", "--seed", "1", "--max_train_steps", str(10**6), "--cache_latents",
        "--max_data_loader_n_workers", "0", "--network_train_unet_only", *more,
    ]  # fmt: skip
    prepared = prepare_words([*words, "--learning_rate", "1e-4"])
    context = prepared.run.context
    weights = context.network.trainable_parameters()

    def predict(denoiser: nn.Module, noised: Any, conditioning: Any, batch: Any) -> Tensor:
        touched: Tensor = Touch.apply(noised.latents_BCHW, *weights)  # type: ignore[no-untyped-call]
        return touched

    stubbed = replace(context, arch=replace(context.arch, predict=predict))
    watch: Any = Watch(num_steps)
    try:
        loop.train(replace(prepared, run=replace(prepared.run, context=stubbed)), watch)
    except Enough:
        return median_ms(watch.marks), weights
    raise AssertionError("the loop ended by itself")


def bare_ms(weights: Sequence[nn.Parameter], num_steps: int, more: Sequence[str]) -> float:
    """Return the milliseconds of a step that does only what is necessary."""
    if "AdamW8bit" in more:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    num_batches = int(more[-1]) if "--gradient_accumulation_steps" in more else 1
    latents, marks = torch.randn(1, 4, 8, 8), []
    for _ in range(num_steps + 1):
        marks.append(time.thread_time())
        for _ in range(num_batches):
            touched: Tensor = Touch.apply(latents, *weights)  # type: ignore[no-untyped-call]
            (touched.square().mean() / num_batches).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return median_ms(marks)


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="measured steps")
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES), help="which cases")
    return parser


def measure(args: argparse.Namespace) -> None:
    num_steps = WARM_UP + args.steps
    torch.set_num_threads(1)  # hundreds of small tensors: threads would wait for each other
    for case in args.case:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build_model(folder / "model")
            make_images(folder / "pictures" / "200_x", 8)
            more = [str(folder / word) if word in ("logs", "events.jsonl") else word for word in CASES[case]]
            ours, weights = our_ms(folder, num_steps, more)
            bare = bare_ms(weights, num_steps, more)
            print(f"{case}: {ours:.2f} ms per step, bare {bare:.2f}, overhead {ours - bare:.2f}")


main = measurement(setup_parser, measure)
