"""--training_adapter beside the trained adapter, compared with merging the file and with the base model alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.memory.planner.prediction import MemoryMode, apply_mode, pass_work
from library.options.train import TrainOptions
from library.processes.process_group import ALONE
from library.protocols import Architecture
from library.training.evaluation.preview_weights import without_training_adapter
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.frozen_adapters import attach_training_adapter
from library.training.models.frozen_base import resolve_base
from library.training.models.frozen_models import load_frozen
from library.training.models.network import create
from library.training.models.step_context import step_context
from library.training.models.weight_formats import BaseFormats
from library.training.planning.meta_run import BatchShape, fake_batch
from library.training.step.context import StepContext
from library.training.step.losses import loss_of
from library.types import Batch
from networks.core.protocol import adopt, open_network_module
from tests.parity.test_counting import count_options, planned_peak
from tests.parity.test_merging import write_adapter_file
from tests.parity.tiny_models import opened_with
from tests.tiny.bases import BASES
from tests.weight_formats import CODECS

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

CPU = torch.device("cpu")
SHAPE = BatchShape(2, 64, 64)
FAST = ("flux", "zimage")
CLOSE = 1e-6  # of the loss, and of the largest gradient
ROUNDED = 3e-6  # of the largest gradient of a U-Net, whose group norms amplify what float32 rounds


def open_with(name: str, model: list[str], *more: str) -> tuple[TrainOptions, Architecture]:
    return opened_with(name, [*model, "--network_train_unet_only", "--mixed_precision", "no", *more])


def write_denoiser_file(name: str, model: list[str], path: Path) -> str:
    """Write an adapter of the denoiser's layers at a strength that changes the loss."""
    _, arch = open_with(name, model)
    torch.manual_seed(2)
    return write_adapter_file(path, arch, 1, BASES[name].module, {}, has_text_encoder=False)


def open_context(options: TrainOptions, arch: Architecture) -> StepContext:
    """Return what a step computes with, the trained adapter with random parameters included."""
    compute, formats = Compute.build(options.precision, CPU), BaseFormats.load(options.precision)
    assert options.network.network_module is not None
    module = open_network_module(options.network.network_module)
    encoders = arch.load.text_encoders()
    models = load_frozen(options.network, formats.denoiser, arch, encoders, None, compute, module)
    resolve_base(options.precision, formats, options.memory, arch, models, compute, ALONE)
    models = attach_training_adapter(options.network, arch, models, CPU)
    models.denoiser.requires_grad_(False)
    network = adopt(create(options.network, module, models))
    network.apply_to(*models.network_view, False, True)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.module.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return step_context(False, 1, arch, 7, LoadedModels(models, None, None), network, compute)


def make_batch(arch: Architecture) -> Batch:
    batch = fake_batch(arch, SHAPE, None, has_latents=True)
    assert batch.latents_BCHW is not None
    latents_BCHW = torch.randn(batch.latents_BCHW.shape, generator=torch.Generator().manual_seed(4))
    return replace(batch, captions=["a cat", "two dogs"], latents_BCHW=latents_BCHW)


def loss_and_gradients(context: StepContext, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    context.network.module.zero_grad()
    loss = loss_of(context, batch, 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in context.network.module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.nightly) for n in BASES])
def test_loss_and_gradients_equal_those_of_the_merged_file(name: str, tmp_path: Path) -> None:
    model = BASES[name].build(tmp_path)
    file = write_denoiser_file(name, model, tmp_path / "beside.safetensors")
    (plain, _), (merged, wanted), (beside, actual) = (
        loss_and_gradients(open_context(options, arch), make_batch(arch))
        for options, arch in (
            open_with(name, model, *more) for more in ((), ("--base_weights", file), ("--training_adapter", file))
        )
    )
    assert abs(plain - merged) > 10 * CLOSE * merged
    assert abs(beside - merged) < CLOSE * merged
    assert len(wanted) > 10 and actual.keys() == wanted.keys()
    share = ROUNDED if name in ("sd", "sd2", "sdxl") else CLOSE
    atol = share * max(float(gradient.abs().max()) for gradient in wanted.values())
    for key, gradient in wanted.items():
        torch.testing.assert_close(actual[key], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("form", [*CODECS])
def test_every_base_format_is_trained_with_it_and_drawn_without_it(form: str, tmp_path: Path) -> None:
    model = BASES["zimage"].build(tmp_path)
    file = write_denoiser_file("zimage", model, tmp_path / "beside.safetensors")
    words = ("--base_format", form)
    options, arch = open_with("zimage", model, *words, "--training_adapter", f"{file}:0.5")
    context, batch = open_context(options, arch), make_batch(arch)
    alone, _ = loss_and_gradients(open_context(*open_with("zimage", model, *words)), batch)
    beside, _ = loss_and_gradients(context, batch)
    assert abs(beside - alone) > 1e-4 * alone
    with without_training_adapter(context.models.training_adapter):
        assert torch.equal(loss_and_gradients(context, batch)[0], alone)
    assert torch.equal(loss_and_gradients(context, batch)[0], beside)


def test_the_planner_counts_its_memory_and_its_operations(tmp_path: Path) -> None:
    model = BASES["zimage"].build(tmp_path)
    file = write_denoiser_file("zimage", model, tmp_path / "beside.safetensors")
    alone, beside = (
        count_options(*open_with("zimage", model, "--cache_latents", *more), SHAPE)
        for more in ((), ("--training_adapter", file))
    )
    # It has the layers and ranks of the trained adapter.
    assert beside.step.adapter_bytes == 2 * alone.step.adapter_bytes
    assert beside.step.gradient_bytes == alone.step.gradient_bytes
    assert planned_peak(beside, False) > planned_peak(alone, False)
    operations = [sum(work.flops for work in pass_work(apply_mode(c.step, MemoryMode()))) for c in (alone, beside)]
    assert operations[1] > operations[0]
