"""What is counted of a run from headers alone, against the allocator's events of the same step on real weights."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.memory.blocks import plain, recompute
from library.memory.planner.steps import peak_of
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.cli import parse
from library.training.planning.counting import BatchShape, CountedRun, count_run, longest_caption
from library.training.run.compute import Compute
from library.training.run.context import Models
from library.training.run.models import LoadedModels
from library.training.run.network import create
from library.training.run.setup import step_context
from library.training.run.step import loss_of
from library.types import Batch
from networks.core.protocol import adopt, open_network_module
from tests.running import SCRIPTS
from tests.runs.bases import BASES
from tests.unit.memory.planner.made_up import allocated_peak

SHARE = 0.03
SHAPE = BatchShape(2, 256, 192)
SHAPES = {"sdxl": BatchShape(4, 384, 256)}  # the buffers inside of convolutions count less where pictures are large
CPU = torch.device("cpu")
FAST = ("flux", "sd")  # the others repeat what these hold


def opened(name: str, folder: Path, *more: str) -> tuple[TrainOptions, Architecture]:
    """Options and parts of a tiny base model, whose denoiser alone is adapted."""
    base = BASES[name]
    package, module, kind = SCRIPTS[base.script]
    options_type = getattr(importlib.import_module(module), kind)
    arguments = [
        *base.build(folder), "--network_module", base.module, "--network_dim", "4", "--cache_latents",
        "--network_train_unet_only", *more,
    ]  # fmt: skip
    options = options_type.from_args(parse(importlib.import_module(base.script).setup_parser(), arguments))
    build: Callable[[Any], Architecture] = importlib.import_module(f"library.architectures.{package}.assembly").build
    return options, build(options)


def real_step(options: TrainOptions, arch: Architecture, shape: BatchShape, recomputes: bool) -> Callable[[], None]:
    """Forward and backward pass of the run on weights and tensors that are there."""
    encoders, denoiser = arch.load.text_encoders(), arch.load.denoiser()
    models = Models(denoiser, encoders, None, arch.view(encoders, denoiser))
    assert options.network.network_module is not None
    network = adopt(create(options.network, open_network_module(options.network.network_module), models))
    network.apply_to(*models.network_view, False, True)
    network.module.train()
    arch.run_blocks_with(denoiser, recompute if recomputes else plain)
    compute = Compute.build(options.precision, CPU)
    context = step_context(options, arch, 7, LoadedModels(models, None, None), network, compute)
    spec = arch.codec.spec
    batch = Batch(
        keys=[str(i) for i in range(shape.count)],
        captions=[longest_caption(arch)] * shape.count,
        pixels_BCHW=None,
        latents_BCHW=torch.randn(
            shape.count, spec.channels, shape.height // spec.downscale, shape.width // spec.downscale
        ),
        conditioning=None,
        loss_weights_B=torch.ones(shape.count),
        masks_B1HW=None,
        sizes_B6=torch.ones(shape.count, 6),
        attributes=[{}] * shape.count,
    )
    return lambda: loss_of(context, batch, 0).backward()


def planned_peak(counted: CountedRun, recomputes: bool) -> int:
    return peak_of(list(counted.step.timeline.moves(lambda place: recomputes, lambda place: True)))


@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps all", "recomputes all"])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.nightly) for n in BASES])
def test_the_step_of_a_base_model_takes_what_is_counted(name: str, recomputes: bool, tmp_path: Path) -> None:
    options, arch = opened(name, tmp_path / "model", "--mixed_precision", "no")
    shape = SHAPES.get(name, SHAPE)
    counted = count_run(options, arch, shape, CPU)
    torch.manual_seed(94)
    real = allocated_peak(real_step(options, arch, shape, recomputes))
    assert planned_peak(counted, recomputes) == pytest.approx(real, rel=SHARE)
